"""Free clusters of the overlay file, of which the lowest is used first.

Owns the set of them: one bit per cluster, in blocks. Only blocks with a free cluster exist. Must not know why a cluster
is free, nor what it contains. Many scattered clusters, which random discards or a defragmentation leave, take as much
memory as long rows of them. The number of blocks is bounded, and so is the memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import islice

BLOCK = 4096  # clusters
MOST_BLOCKS = 1 << 13  # some MiB of memory, for 2 TiB of a file with clusters of 64 KiB
LOOKED_AT = 256  # blocks, which takes 0.5 ms


class FreePlaces:
    """Offsets of free clusters."""

    def __init__(self, cluster_size: int) -> None:
        self._cluster_size = cluster_size
        self._blocks: dict[int, int] = {}  # number -> bits, the lowest cluster lowest; none of them is 0
        # By descending number, so that the lowest is taken from the end, and negative, because bisect wants them
        # ascending.
        self._order: list[int] = []

    def add(self, offsets: Iterable[int]) -> None:
        """Add clusters. Takes 1 us for each that has no neighbour among them."""
        size = self._cluster_size
        start = end = -1
        for offset in sorted(offsets):
            if offset == end:
                end += size
                continue
            if end >= 0:
                self._add_row(start // size, end // size)
            start, end = offset, offset + size
        if end >= 0:
            self._add_row(start // size, end // size)

    def _add_row(self, first: int, end: int) -> None:
        while first < end:
            number, at = divmod(first, BLOCK)
            count = min(end - first, BLOCK - at)
            bits = self._blocks.get(number, 0)
            if not bits:
                insort(self._order, -number)
            self._blocks[number] = bits | ((1 << count) - 1) << at
            first += count

    def forget_some(self) -> None:
        """Forget the highest clusters, if there are more than MOST_BLOCKS blocks."""
        if (more := len(self._order) - MOST_BLOCKS) > 0:
            for number in self._order[:more]:
                del self._blocks[-number]
            del self._order[:more]

    def take(self) -> int | None:
        """Take the lowest cluster; None if there is none."""
        if not self._order:
            return None
        number = -self._order[-1]
        bits = self._blocks[number]
        at = (bits & -bits).bit_length() - 1
        self._remove(number * BLOCK + at, 1)
        return (number * BLOCK + at) * self._cluster_size

    def __bool__(self) -> bool:
        return bool(self._order)

    def take_lowest(self, most_rows: int, most: int) -> list[int]:
        """Take the lowest rows of neighbours: at most `most_rows`, with at most `most` clusters in all. Ascending."""
        taken: list[int] = []
        for _ in range(most_rows):
            if not self._order or len(taken) == most:
                break
            number = -self._order[-1]
            bits = self._blocks[number]
            at = (bits & -bits).bit_length() - 1
            count = min(_ones_below(bits >> at), most - len(taken))
            first = number * BLOCK + at
            self._remove(first, count)
            taken += range(first * self._cluster_size, (first + count) * self._cluster_size, self._cluster_size)
        return taken

    def take_row(self, count: int, below: int) -> int | None:
        """Take the lowest `count` neighbours before offset `below`; None if the first LOOKED_AT blocks have none."""
        first = self._row(count, below // self._cluster_size)
        if first is None:
            return None
        self._remove(first, count)
        return first * self._cluster_size

    def _row(self, count: int, below: int) -> int | None:
        """The first of the lowest `count` neighbours before this cluster."""
        end = before = 0  # where the block before ends, and how many clusters at its end are free
        for negative in islice(reversed(self._order), LOOKED_AT):
            start, bits = -negative * BLOCK, self._blocks[-negative]
            if start != end:
                before = 0
            end = start + BLOCK
            if before + _ones_below(bits) >= count:
                first = start - before
            elif found := _rows(bits, count):
                first = start + (found & -found).bit_length() - 1
            else:
                above = _ones_above(bits, BLOCK)
                before = before + BLOCK if above == BLOCK else above
                if end - before + count > below:
                    return None
                continue
            return first if first + count <= below else None
        return None

    def _remove(self, first: int, count: int) -> None:
        end = first + count
        while first < end:
            number, at = divmod(first, BLOCK)
            part = min(end - first, BLOCK - at)
            if bits := self._blocks[number] & ~(((1 << part) - 1) << at):
                self._blocks[number] = bits
            else:
                del self._blocks[number]
                del self._order[bisect_left(self._order, -number)]
            first += part

    def beginning_at(self, end: int) -> int:
        """Where the row begins that ends at offset `end`; `end` if there is none."""
        first = end // self._cluster_size
        while first:
            number, at = divmod(first - 1, BLOCK)
            bits = self._blocks.get(number, 0) & (2 << at) - 1
            count = _ones_above(bits, at + 1)
            first -= count
            if count <= at:
                break
        return first * self._cluster_size

    def forget(self, offset: int, end: int) -> None:
        """Forget the clusters from `offset` to `end`, all of which are free."""
        self._remove(offset // self._cluster_size, (end - offset) // self._cluster_size)


def _ones_below(bits: int) -> int:
    """How many of the lowest bits are set, without one in between that is not."""
    return (~bits & bits + 1).bit_length() - 1


def _ones_above(bits: int, width: int) -> int:
    """How many of the highest of `width` bits are set, without one in between that is not."""
    return width - (bits ^ (1 << width) - 1).bit_length()


def _rows(bits: int, count: int) -> int:
    """The bits that are set together with the `count - 1` bits above each."""
    length = 1
    while bits and length < count:
        step = min(length, count - length)
        bits &= bits >> step
        length += step
    return bits
