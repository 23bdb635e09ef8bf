"""L1 and L2 table entries: flat arrays of u64 in memory, little-endian bytes in the file.

Entry values of an L2 table: 0 the cluster is missing, 1 it reads as zeros, anything else the offset of its data.
"""

from __future__ import annotations

import sys
from array import array

MISSING = 0
ZERO = 1

_SWAP = sys.byteorder == "big"


def empty_table(entries: int) -> array[int]:
    """A table of `entries` zeros."""
    return array("Q", bytes(8 * entries))


def decode_table(data: bytes | bytearray | memoryview) -> array[int]:
    """Entries from their bytes; a rest of less than 8 bytes is an error of the caller."""
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


def encode_table(table: array[int]) -> bytes:
    """The bytes of the entries."""
    if not _SWAP:
        return table.tobytes()
    swapped = array("Q", table)
    swapped.byteswap()
    return swapped.tobytes()
