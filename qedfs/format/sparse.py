"""A table that is mostly zeros, held in memory as pages of it, and only those that have an entry.

Owns where the entries are. A sparse file of some KiB may claim an L1 table of 16 MiB, a server one of 32; held page by
page it costs what is really in it, and a walk over it passes over the rest in one step. Pure; must not know what the
entries mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from qedfs.format.geometry import ENTRY_SIZE
from qedfs.format.tables import empty_table

PAGE_ENTRIES = 512  # 4 KiB: what a hole of a sparse file is a multiple of on most file systems
PAGE_BYTES = PAGE_ENTRIES * ENTRY_SIZE
_SHIFT = PAGE_ENTRIES.bit_length() - 1
_MASK = PAGE_ENTRIES - 1
_ZEROS = bytes(PAGE_BYTES)


class SparseTable:
    """`length` entries, of which those that were never set are 0."""

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

    @property
    def held_bytes(self) -> int:
        """What the pages take in memory."""
        return len(self._pages) * PAGE_BYTES

    def part(self, first: int, count: int) -> array[int]:
        """The entries from `first` on, all of one page; fewer at the end of the table."""
        count = min(count, self._length - first)
        page = self._pages.get(first >> _SHIFT)
        at = first & _MASK
        return empty_table(count) if page is None else page[at : at + count]

    def next_filled(self, first: int, most: int) -> int:
        """The first entry from `first` on that is not 0; where none is, how far was looked.

        At most `most` entries of pages that hold any are looked at; the others cost nothing.
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
        """The pages that hold an entry, each with the index of its first one; changes to them are kept."""
        for number, page in self._pages.items():
            yield number << _SHIFT, page

    def load(self, first: int, data: memoryview, decode: Callable[[memoryview], array[int]]) -> None:
        """Take over entries as they stand in a file: from the first one of a page on, whole pages or up to the end."""
        for at in range(0, len(data), PAGE_BYTES):
            page = data[at : at + PAGE_BYTES]
            if page != _ZEROS[: len(page)]:
                entries = decode(page)
                entries.extend(empty_table(PAGE_ENTRIES - len(entries)))
                self._pages[(first + at // ENTRY_SIZE) >> _SHIFT] = entries

    def _next_page(self, index: int) -> int:
        """Where the next page begins that holds an entry, or the end of the table: a legal one has 4096 pages."""
        last = (self._length - 1) >> _SHIFT
        number = next((n for n in range((index >> _SHIFT) + 1, last + 1) if n in self._pages), last + 1)
        return min(number << _SHIFT, self._length)
