"""Sees that a reader goes straight ahead, and says how far to fetch before it.

Owns the memory of the last few readers of one image. Pure: positions in, a range out. The window doubles with every
request that continues the last one and is forgotten when the pattern breaks, as in the kernel's own read-ahead.
"""

from __future__ import annotations

import dataclasses

FIRST_BYTES = 512 << 10
READERS = 8  # interleaved sequential readers of one image that are told apart
# The kernel has a few reads of up to 1 MiB under way for one reader, and they may change places.
SLACK_BYTES = 4 << 20


@dataclasses.dataclass(slots=True)
class _Reader:
    end: int  # highest byte it has read
    window: int = 0
    fetched_to: int = 0  # everything below has been asked for on its behalf, or is about to be


class Readahead:
    """The sequential readers of one image."""

    def __init__(self) -> None:
        self.active = False  # somebody has gone straight ahead: tell of every read, not only of those that miss
        self._readers: list[_Reader] = []

    def advise(self, pos: int, size: int, *, most: int, step: int) -> tuple[int, int] | None:
        """Tell of a read; returns the range (pos, size) to fetch ahead of it, or None.

        `most`: bytes to be ahead of the reader at the most. `step`: bytes that are worth a request.
        """
        reader = self._find(pos, size)
        if reader is None:
            self._readers.insert(0, _Reader(pos + size))
            del self._readers[READERS:]
            return None
        self.active = True
        reader.end = max(reader.end, pos + size)
        reader.window = min(most, max(FIRST_BYTES, reader.window * 2))
        start = max(reader.end, reader.fetched_to)
        stop = reader.end + reader.window
        if stop - start < min(step, reader.window):
            return None
        reader.fetched_to = stop
        return start, stop - start

    def fell_short(self, pos: int, stop: int) -> None:
        """Of what was advised up to `stop`, nothing from `pos` on has been asked for: tell its reader again."""
        for reader in self._readers:
            if reader.end < stop <= reader.fetched_to:
                reader.fetched_to = max(pos, reader.end)

    def _find(self, pos: int, size: int) -> _Reader | None:
        for reader in self._readers:
            slack = SLACK_BYTES if reader.window else 0
            if reader.end - slack <= pos <= reader.end + slack and pos + size > reader.end - slack:
                return reader
        return None
