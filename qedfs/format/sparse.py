"""A sparse array for tables that are mostly zeros: only pages with a non-zero entry are in memory.

A sparse file of a few KiB may claim an L1 table of 16 MiB, and a server may claim one of 32 MiB. Stored by page, such a
table costs only what it really contains, and a scan skips the missing pages without looking at their entries. No I/O.
Must not know what the entries mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from qedfs.format.geometry import ENTRY_SIZE
from qedfs.format.tables import empty_table

PAGE_ENTRIES = 512  # 4 KiB, the block size of most file systems: a hole in a sparse file is a multiple of it
PAGE_BYTES = PAGE_ENTRIES * ENTRY_SIZE
_SHIFT = PAGE_ENTRIES.bit_length() - 1
_MASK = PAGE_ENTRIES - 1
_ZEROS = bytes(PAGE_BYTES)


class SparseTable:
    """A table of `length` entries. An entry that was never set is 0."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._pages: dict[int, array[int]] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        page = self._pages.get(index >> _SHIFT)
        return 0 if page is None else page[index & _MASK]

    def __setitem__(self, index: int, entry: int) -> None:
        page = self._pages.get(index >> _SHIFT)
        if page is None:
            page = self._pages[index >> _SHIFT] = empty_table(PAGE_ENTRIES)
        page[index & _MASK] = entry

    def grow(self, length: int) -> None:
        """Let the table have more entries, which are 0."""
        self._length = length

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the pages take."""
        return len(self._pages) * PAGE_BYTES

    def part(self, first: int, count: int) -> array[int]:
        """`count` entries from `first` on, all in one page; fewer at the end of the table."""
        count = min(count, self._length - first)
        page = self._pages.get(first >> _SHIFT)
        at = first & _MASK
        return empty_table(count) if page is None else page[at : at + count]

    def next_filled(self, first: int, most: int) -> int:
        """The index of the first non-zero entry from `first` on. If none is found, the index where the scan stopped.

        The scan looks at no more than `most` entries of existing pages. Missing pages do not count.
        """
        index = first
        while index < self._length:
            page = self._pages.get(index >> _SHIFT)
            if page is None:
                index = self._next_page(index)
                continue
            if most <= 0:
                break
            stop = min((index | _MASK) + 1, self._length, index + most)
            base = index & ~_MASK
            found = next((at for at in range(index - base, stop - base) if page[at]), None)
            if found is not None:
                return base + found
            most -= stop - index
            index = stop
        return min(index, self._length)

    def filled_pages(self) -> Iterator[tuple[int, array[int]]]:
        """The existing pages, each with the index of its first entry. They are not copies: a change is stored."""
        for number, page in self._pages.items():
            yield number << _SHIFT, page

    def load(self, first: int, data: memoryview, decode: Callable[[memoryview], array[int]]) -> None:
        """Load entries as stored in a file. `first` begins a page; `data` holds whole pages, or ends with the table."""
        for at in range(0, len(data), PAGE_BYTES):
            page = data[at : at + PAGE_BYTES]
            if page != _ZEROS[: len(page)]:
                entries = decode(page)
                entries.extend(empty_table(PAGE_ENTRIES - len(entries)))
                self._pages[(first + at // ENTRY_SIZE) >> _SHIFT] = entries

    def _next_page(self, index: int) -> int:
        """The first index of the next existing page, or the end of the table. A legal L1 table has up to 4096 pages."""
        last = (self._length - 1) >> _SHIFT
        number = next((n for n in range((index >> _SHIFT) + 1, last + 1) if n in self._pages), last + 1)
        return min(number << _SHIFT, self._length)
