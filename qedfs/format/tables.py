"""Encoding of L1 and L2 tables: arrays of u64 in memory, little-endian in the file.

Pure. Owns the encoding, and the entries that are no offset: MISSING and ZERO. Must not know which cluster an entry is
of. An L2 entry of 0 means that the cluster is missing, 1 that it reads as zeros. Anything else is the offset of its
data.
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
    """Decode entries. The caller must pass a multiple of 8 bytes."""
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


def encode_table(table: array[int]) -> bytes:
    """Encode entries."""
    if not _SWAP:
        return table.tobytes()
    swapped = array("Q", table)
    swapped.byteswap()
    return swapped.tobytes()
