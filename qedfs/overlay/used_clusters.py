"""Which clusters of an overlay file something refers to, as a bitmap: one bit for each cluster of the file.

Owns the bits. Must not know what refers to a cluster, nor what follows from two references.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from operator import setitem
from typing import cast

from qedfs.format.geometry import MAX_TABLE_SIZE

MAX_CLUSTERS = 1 << 29  # one bit each, 64 MiB of memory. Only a sparse file made for the purpose has more.
MAX_SCATTERED = 1 << 26  # of a file whose clusters `claim_scattered` can mark, one byte each, 64 MiB of memory, too


_ENCODED = struct.Struct("<Q??")  # and the bits after it

Marks = bytearray | mmap.mmap
_mark = cast("Callable[[Marks, int, int], None]", setitem)


def shared_marks(clusters: int) -> Marks:
    """Marks for `claim_scattered` that forked processes have in common. Takes memory as they are set."""
    return mmap.mmap(-1, clusters)


class UsedClusters:
    """The clusters of one file, numbered from its start. `count`: of those that are used."""

    def __init__(self, clusters: int, marks: Marks | None = None) -> None:
        """`clusters`: at most MAX_CLUSTERS. `marks`: that others set, too; see `add`."""
        self.count = 0
        self._bits = bytearray(-(-clusters // 8) + MAX_TABLE_SIZE // 8)  # with room for `claim_table` at the end
        self._clusters = clusters
        self._marks = marks  # of `claim_scattered`: a byte of 1 for each cluster
        self._has_marked = False
        self._past_end = False

    def claim(self, cluster: int) -> bool:
        """Mark a cluster as used. Returns False if it is already."""
        byte, bit = cluster >> 3, 1 << (cluster & 7)
        if self._bits[byte] & bit:
            return False
        self._bits[byte] |= bit
        self.count += 1
        return True

    def claim_row(self, first: int, count: int) -> bool:
        """Mark `count` clusters as used. Returns False, and marks none, if one of them is already."""
        byte, shift = divmod(first, 8)
        mask = ((1 << count) - 1) << shift
        part = slice(byte, byte + (shift + count + 7) // 8)
        used = int.from_bytes(self._bits[part], "little")
        if used & mask:
            return False
        self._bits[part] = (used | mask).to_bytes(part.stop - part.start, "little")
        self.count += count
        return True

    def claim_scattered(self, places: Iterable[int], count: int) -> None:
        """Mark clusters in any order as used. `places` has `count` of them, and a 0 for each entry without one.

        Whether one of them is outside the file, or was used already, only `settle` tells. 50 ns for each.
        """
        if self._marks is None:
            self._marks = bytearray(self._clusters)
        self._has_marked = True
        try:
            # The function, not the method of the bytearray, for which Python makes a tuple of arguments each time.
            deque(map(_mark, repeat(self._marks), places, repeat(1)), maxlen=0)
        except IndexError:
            self._past_end = True
        self.count += count

    def settle(self, first: int) -> bool:
        """Whether each `claim_scattered` was of clusters from `first` to the end that nothing else refers to."""
        if self._marks is None or not self._has_marked:
            return True
        self._marks[0] = 0
        if self._past_end or any(self._marks[:first]):
            return False
        bits = int.from_bytes(self._bits, "little")
        for bit in range(8):
            bits |= int.from_bytes(self._marks[bit::8], "little") << bit
        self._bits[:] = bits.to_bytes(len(self._bits), "little")
        self._marks = None
        return bits.bit_count() == self.count

    def encoded(self) -> bytes:
        """What `add` takes, without the marks."""
        return _ENCODED.pack(self.count, self._has_marked, self._past_end) + self._bits

    def add(self, encoded: bytes) -> bool:
        """Mark what another process has marked as used, whose marks are the same.

        Returns False if a cluster is used by both. Of those of `claim_scattered` only `settle` tells.
        """
        count, has_marked, past_end = _ENCODED.unpack_from(encoded)
        mine = int.from_bytes(self._bits, "little")
        others = int.from_bytes(memoryview(encoded)[_ENCODED.size :], "little")
        self._bits[:] = (mine | others).to_bytes(len(self._bits), "little")
        self.count += count
        self._has_marked |= has_marked
        self._past_end |= past_end
        return not mine & others

    def claim_table(self, first: int, count: int) -> int:
        """Mark `count` clusters, at most MAX_TABLE_SIZE, as used. Returns how many of them were used already."""
        byte, shift = divmod(first, 8)
        mask = ((1 << count) - 1) << shift
        part = slice(byte, byte + 1 + MAX_TABLE_SIZE // 8)
        used = int.from_bytes(self._bits[part], "little")
        self._bits[part] = (used | mask).to_bytes(1 + MAX_TABLE_SIZE // 8, "little")
        shared = (used & mask).bit_count()
        self.count += count - shared
        return shared

    def unused(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of clusters from `first` to `stop` that nothing refers to, each as (first, end)."""
        begin = end = first
        for at, to in _clear_bits(self._bits):
            at, to = max(at, begin), min(to, stop)
            if at >= to:
                continue
            if at > end and begin < end:
                yield begin, end
            begin, end = at if at > end or begin == end else begin, to
        if begin < end:
            yield begin, end


def _clear_bits(bits: bytearray) -> Iterator[tuple[int, int]]:
    """The bits that are not set, as (first, end). Neighbours may be apart. Long runs take one step."""
    for found in re.finditer(rb"\0+|[^\0\xff]", bits):
        if not bits[found.start()]:
            yield 8 * found.start(), 8 * found.end()
            continue
        for bit in range(8):
            if not bits[found.start()] >> bit & 1:
                yield 8 * found.start() + bit, 8 * found.start() + bit + 1
