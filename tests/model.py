"""The oracle of the crash tests: what each sector of a disk may contain after a crash.

Owns the history of writes and flushes and the rule of which contents are legal. Must not know how they are stored.

Each sector has versions: its content before anybody wrote, and one for every write that covers it. A flush makes the
writes that had returned before it began *committed*. After a crash a sector may hold any version that had been begun,
except those that a later, committed one has replaced: between the committed minimum and the current maximum, as in
the write log of Oxide Crucible's `crutest`. Writes that overlap in time have no order, so neither replaces the other.

Time is the length of the storage's log ("position"): a crash at position P keeps the operations before P in some form.
Events at one position are told apart by the order in which they were reported. With `on_return` time is that order
itself: a position is a number of events.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

SECTOR = 512


@dataclasses.dataclass(slots=True, eq=False)
class Version:
    """One write, or what was there before the first."""

    begun_at: int  # position
    begun: float  # order of events
    returned: float = math.inf
    committed_at: float = math.inf  # position from which on it survives


_UNTOUCHED = Version(-1, -1, -1, -1)  # what was there before the first write


@dataclasses.dataclass(slots=True)
class SectorModel:
    """The legal contents of one image."""

    base: bytes  # what the image reads as before the first write, a whole number of sectors
    on_return: bool = False  # whether a write is committed when it returns (kill -9) or when a flush returns (power)
    events: int = 0  # reported so far
    _open: list[Version] = dataclasses.field(default_factory=list)  # returned, not committed
    _sectors: dict[int, list[tuple[Version, bytes]]] = dataclasses.field(default_factory=dict)

    def begin(self, at: int, pos: int, data: bytes) -> Version:
        """A write of whole sectors was called at position `at`. One that never returns may or may not be there."""
        assert pos % SECTOR == 0 == len(data) % SECTOR
        version = Version(at, self._event())
        for start in range(0, len(data), SECTOR):
            sector = (pos + start) // SECTOR
            known = self._sectors.setdefault(sector, [(_UNTOUCHED, self.base_of(sector))])
            known.append((version, data[start : start + SECTOR]))
        return version

    def returned(self, version: Version) -> None:
        """The write has returned without an error."""
        version.returned = self._event()
        if self.on_return:
            version.committed_at = version.returned
        else:
            self._open.append(version)

    def flushing(self) -> float:
        """A flush was called; hand the result to `flushed`."""
        return self._event()

    def flushed(self, since: float, at: int) -> None:
        """The flush that began at `since` has returned without an error."""
        self._event()
        for version in self._open:
            if version.returned < since:
                version.committed_at = at
        self._open = [version for version in self._open if version.committed_at == math.inf]

    def has_begun(self, at: float) -> bool:
        """Whether a write had been called by position `at`."""
        return any(version.begun >= 0 and version.begun_at <= at for version in self._versions())

    def has_committed(self, at: float) -> bool:
        """Whether a write survives a crash at position `at`."""
        return any(version.begun >= 0 and version.committed_at <= at for version in self._versions())

    def _versions(self) -> Iterator[Version]:
        return (version for known in self._sectors.values() for version, _ in known)

    def lost(self) -> None:
        """A barrier has failed: no write that has returned and was not flushed is ever sure to be there any more."""
        self._event()
        for version in self._open:
            version.returned = math.inf
        self._open.clear()

    def settled(self, content: bytes | bytearray, at: int) -> None:
        """Whoever opened the image after a loss has read this, at position `at`: the disk has it."""
        for sector, known in self._sectors.items():
            now = self._event()
            known.append((Version(at, now, now, at), bytes(content[sector * SECTOR : (sector + 1) * SECTOR])))

    def base_of(self, sector: int) -> bytes:
        """A sector before anybody wrote to it."""
        return self.base[sector * SECTOR : (sector + 1) * SECTOR]

    def legal(self, sector: int, at: float) -> list[bytes]:
        """The contents that a sector may have after a crash at position `at`."""
        known = self._sectors.get(sector)
        if known is None:
            return [self.base_of(sector)]
        settled = _UNTOUCHED.begun
        for version, _ in known:  # half of the time of a judgement: no generator for each sector
            if version.committed_at <= at and version.begun > settled:
                settled = version.begun
        return [data for version, data in known if version.begun_at <= at and version.returned >= settled]

    def legal_read(self, sector: int, since: int, until: int) -> list[bytes]:
        """What a read that ran between two events may have returned: no write that ended before it began is undone."""
        known = self._sectors.get(sector)
        if known is None:
            return [self.base_of(sector)]
        settled = max(version.begun for version, _ in known if version.returned <= since)
        return [data for version, data in known if version.begun <= until and version.returned >= settled]

    def fault(self, content: bytes | bytearray, at: float) -> str | None:
        """What is wrong with an image that was read after a crash at position `at`, or None."""
        if len(content) != len(self.base):
            return f"the image has {len(content)} bytes instead of {len(self.base)}"
        expected = bytearray(self.base)
        for sector in self._sectors:
            found = bytes(content[sector * SECTOR : (sector + 1) * SECTOR])
            if found not in self.legal(sector, at):
                return f"written sector {sector} {self._named(sector, found)}"
            expected[sector * SECTOR : (sector + 1) * SECTOR] = found
        if content != expected:
            sector = next(i for i in range(0, len(content), SECTOR) if content[i : i + 512] != expected[i : i + 512])
            return f"sector {sector // SECTOR} that nobody wrote differs from the backing"
        return None

    def _named(self, sector: int, found: bytes) -> str:
        versions = [data for _, data in self._sectors[sector]]
        if found in versions:
            return f"has version {versions.index(found)} of {len(versions)}, which a committed one had replaced"
        return "has zeros" if not any(found) else "has bytes of nobody"

    def _event(self) -> int:
        self.events += 1
        return self.events
