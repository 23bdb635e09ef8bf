"""Which states a disk may be in after a power cut: the model of order and tears.

Owns the enumeration of the states at one position of a log and the building of the file's bytes. Must not know what is
in the file.

Everything written before the beginning of the last barrier that had ended is there. Each write after it ("pending") may
be there wholly, not at all, or as its first or last sectors; a sector is never torn. The file may have grown to its
length at that time or not, or in part, and the space it grew by may hold zeros or what a deleted file left.

Where a barrier has failed, some pages are not there for certain, however many barriers succeed afterwards: the disk has
what it had before. The page cache, from which the program read on, has shown otherwise.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from tests.fakes.storage import BarrierBegun, BarrierEnded, Entry, Lost, Resized, Written

SECTOR = 512
ALL_SUBSETS = 8  # pending operations up to which every subset is taken
RANDOM_SUBSETS = 64
TEARS = (512, 4096)  # bytes kept at either end of a torn write


class Piece(NamedTuple):
    """Bytes start..stop of the pending operation at `place` (an index) in the log have reached the disk."""

    place: int
    start: int
    stop: int


class Truncation(NamedTuple):
    """One state. `size` is the length of the file; `garbage` fills what it grew by."""

    position: int
    pieces: tuple[Piece, ...]
    size: int
    garbage: bool


class Choice(NamedTuple):
    """Which pending operations have reached the disk: a test of their number (None: at random), and one torn write."""

    kept: Callable[[int], object] | None
    torn: Piece | None = None


class Disk:
    """The states of a log, position by position, in rising order."""

    def __init__(self, start: bytes, log: Sequence[Entry]) -> None:
        self._log = log
        self._durable = bytearray(start)
        self._covered = 0  # index up to which `_durable` holds the log
        self._begun: dict[int, int] = {}
        self._barrier_end = 0
        self._scanned = 0
        self._size_now = len(start)

    def advance(self, position: int) -> None:
        """Go on to `position`: the operations before it have been issued."""
        for index in range(self._scanned, position):
            entry = self._log[index]
            if isinstance(entry, BarrierBegun):
                self._begun[entry.number] = index
            elif isinstance(entry, BarrierEnded):
                self._barrier_end = max(self._barrier_end, self._begun[entry.number])
            else:
                self._size_now = _size_after(self._size_now, entry)
        self._scanned = position
        for entry in self._log[self._covered : self._barrier_end]:
            _apply(self._durable, entry)
        self._covered = self._barrier_end

    def pending(self) -> list[int]:
        """Indices of the operations that may or may not have reached the disk."""
        return [i for i in range(self._covered, self._scanned) if isinstance(self._log[i], Written | Resized)]

    def cuts(self, most: int, rng: random.Random) -> Iterator[Truncation]:
        """At most `most` states at this position: subsets and tears, each with one way of growing."""
        pending = self.pending()
        choices = [*_subsets(len(pending)), *self._tears(pending)]
        for choice in rng.sample(choices, min(most, len(choices))):
            yield self._cut(sorted(self._pieces(choice, pending, rng)), rng)

    def _pieces(self, choice: Choice, pending: list[int], rng: random.Random) -> Iterator[Piece]:
        if choice.torn is not None:
            yield choice.torn
        for number, index in enumerate(pending):
            chosen = rng.random() < 0.5 if choice.kept is None else choice.kept(number)
            if chosen and (choice.torn is None or choice.torn.place != index):
                entry = self._log[index]
                yield Piece(index, 0, len(entry.data) if isinstance(entry, Written) else 0)

    def build(self, cut: Truncation) -> bytearray:
        """The bytes of the file in a state at this position."""
        base = len(self._durable)
        image = bytearray(self._durable)
        end = max([cut.size, *(_end(self._log[piece.place]) for piece in cut.pieces)])
        image.extend(_garbage(base, end) if cut.garbage else bytes(max(0, end - base)))
        losses = [Piece(i, 0, 0) for i in range(self._covered, self._scanned) if isinstance(self._log[i], Lost)]
        for piece in sorted([*cut.pieces, *losses]):
            entry = self._log[piece.place]
            if isinstance(entry, Lost):
                _apply(image, entry)
            elif isinstance(entry, Written):
                image[entry.offset + piece.start : entry.offset + piece.stop] = entry.data[piece.start : piece.stop]
            elif isinstance(entry, Resized) and entry.size < len(image):
                # Cut and grown again: zeros for certain.
                image[entry.size :] = bytes(len(image) - entry.size)
        del image[cut.size :]
        return image

    def _tears(self, pending: list[int]) -> Iterator[Choice]:
        """Each write with only its first or last sectors, the others missing, there, or there if they came before."""
        for number, index in enumerate(pending):
            entry = self._log[index]
            size = len(entry.data) if isinstance(entry, Written) else 0
            for kept in TEARS:
                if kept < size:
                    for torn in (Piece(index, 0, kept), Piece(index, size - kept, size)):
                        yield Choice(lambda _: False, torn)
                        yield Choice(lambda _: True, torn)
                        yield Choice(partial(operator.gt, number), torn)

    def _cut(self, pieces: list[Piece], rng: random.Random) -> Truncation:
        low, high = sorted((len(self._durable), self._size_now))
        size = rng.choice((low, high, high, rng.randrange(low, high + 1, SECTOR)))
        return Truncation(self._scanned, tuple(pieces), size, rng.random() < 0.5)


def _subsets(count: int) -> Iterator[Choice]:
    """All subsets of few operations; of many: none, all, each alone, all but each, each prefix, some at random."""
    if count <= ALL_SUBSETS:
        yield from (Choice(partial(_bit, mask)) for mask in range(1 << count))
        return
    yield Choice(lambda _: True)
    for number in range(count):
        yield Choice(partial(operator.eq, number))
        yield Choice(partial(operator.ne, number))
        yield Choice(partial(operator.gt, number))
    for _ in range(RANDOM_SUBSETS):
        yield Choice(None)


def _bit(mask: int, number: int) -> int:
    return mask >> number & 1


def _apply(image: bytearray, entry: Entry) -> None:
    if isinstance(entry, Written):
        if len(image) < entry.offset:
            image.extend(bytes(entry.offset - len(image)))
        image[entry.offset : entry.offset + len(entry.data)] = entry.data
    elif isinstance(entry, Lost):
        for offset, old in entry.pages:
            kept = old[: max(0, len(image) - offset)]
            image[offset : offset + len(kept)] = kept
    elif isinstance(entry, Resized):
        if entry.size < len(image):
            del image[entry.size :]
        else:
            image.extend(bytes(entry.size - len(image)))


def _size_after(size: int, entry: Entry) -> int:
    if isinstance(entry, Written):
        return max(size, entry.offset + len(entry.data))
    return entry.size if isinstance(entry, Resized) else size


def _end(entry: Entry) -> int:
    return entry.offset + len(entry.data) if isinstance(entry, Written) else 0


def _garbage(start: int, stop: int) -> bytes:
    """What could be mistaken for table entries: small multiples of 4 KiB."""
    count = max(0, stop - start)
    return (b"".join((4096 * n).to_bytes(8, "little") for n in range(1, 65)) * (count // 512 + 1))[:count]
