"""Read-ahead: detects sequential readers of one image, and advises how far to fetch ahead of them.

Owns the state of the last few readers. Must not know which bytes are missing, nor fetch them. Pure: positions in, a
range out. As in the kernel's read-ahead, the window doubles with every request that continues the last one, and is
reset when the pattern breaks.
"""

from __future__ import annotations

import dataclasses

FIRST_BYTES = 512 << 10
READERS = 8  # interleaved sequential readers of one image that can be told apart
# The kernel has several reads of up to 1 MiB in flight for one reader, and they may arrive out of order.
SLACK_BYTES = 4 << 20


@dataclasses.dataclass(slots=True)
class _Reader:
    end: int  # the end of the highest range it has read
    window: int = 0
    fetched_to: int = 0  # everything below has been requested for it, or is about to be


class Readahead:
    """The sequential readers of one image."""

    def __init__(self) -> None:
        # Whether a sequential reader has been seen. From then on `advise` needs every read, not only the misses.
        self.active = False
        self._readers: list[_Reader] = []

    def advise(self, pos: int, size: int, *, most: int, step: int) -> tuple[int, int] | None:
        """Note a read. Returns the range (pos, size) to fetch ahead of it, or None.

        `most`: maximum distance ahead of the reader in bytes. `step`: minimum size of a worthwhile request.
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
        """Note that nothing from `pos` up to `stop` was requested after all, so that it is advised again."""
        for reader in self._readers:
            if reader.end < stop <= reader.fetched_to:
                reader.fetched_to = max(pos, reader.end)

    def _find(self, pos: int, size: int) -> _Reader | None:
        for reader in self._readers:
            slack = SLACK_BYTES if reader.window else 0
            if reader.end - slack <= pos <= reader.end + slack and pos + size > reader.end - slack:
                return reader
        return None
