"""The L1 table of an overlay in memory: pages of it, and only those that hold an entry.

Owns where its entries are. A sparse file of some KiB may claim a table of 16 MiB; held page by page it costs what is
really in it, and a walk over it passes over the rest in one step. Must not know what the entries mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from qedfs.format.geometry import ENTRY_SIZE, round_up
from qedfs.format.tables import decode_table, empty_table
from qedfs.overlay.holes import Holes
from qedfs.overlay.storage import Storage

PAGE_ENTRIES = 512  # 4 KiB: what a hole of a sparse file is a multiple of on most file systems
READ_BYTES = 64 << 10
_SHIFT = PAGE_ENTRIES.bit_length() - 1
_MASK = PAGE_ENTRIES - 1
_PAGE_BYTES = PAGE_ENTRIES * ENTRY_SIZE
_ZEROS = bytes(READ_BYTES)


class L1:
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
        return len(self._pages) * _PAGE_BYTES

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

    def load(self, first: int, data: bytearray) -> None:
        """Take over the entries that these bytes hold, whole pages but for the end of the table."""
        for at in range(0, len(data), _PAGE_BYTES):
            page = data[at : at + _PAGE_BYTES]
            if not _ZEROS.startswith(page):
                page += bytes(_PAGE_BYTES - len(page))
                self._pages[(first + at // ENTRY_SIZE) >> _SHIFT] = decode_table(page)

    def _next_page(self, index: int) -> int:
        """Where the next page begins that holds an entry, or the end of the table: a legal one has 4096 pages."""
        last = (self._length - 1) >> _SHIFT
        number = next((n for n in range((index >> _SHIFT) + 1, last + 1) if n in self._pages), last + 1)
        return min(number << _SHIFT, self._length)


def read_l1(storage: Storage, offset: int, length: int) -> L1:
    """The table of `length` entries at `offset` of the file; its holes are passed over. Waits for the disk."""
    table = L1(length)
    holes = Holes(storage)
    at, end = 0, length * ENTRY_SIZE
    while at < end:
        if hole := holes.at(offset + at):
            # Whole pages, as they are held: what follows in a page that begins in a hole is read with it.
            at = round_up(at + hole - _PAGE_BYTES + 1, _PAGE_BYTES) if hole >= _PAGE_BYTES else at
        if at >= end:
            break
        data = bytearray(min(READ_BYTES, end - at))
        storage.read(offset + at, memoryview(data))
        table.load(at // ENTRY_SIZE, data)
        at += len(data)
    return table
