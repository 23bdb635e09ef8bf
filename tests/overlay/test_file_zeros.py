"""Zeros in the overlay file: only what is not zero is written, and holes are not read."""

from __future__ import annotations

import pytest

from qedfs.overlay.file_zeros import PIECE_BYTES, is_zero, write_zeros
from tests.fakes.storage import MemoryStorage

MIB = 1 << 20


def file_with(*places: int) -> MemoryStorage:
    data = bytearray(MIB)
    for place in places:
        data[place] = 1
    return MemoryStorage(data)


@pytest.mark.parametrize("place", [4096, 5000, 4096 + PIECE_BYTES, MIB // 2 + 4095])
def test_one_byte_is_found_and_goes(place: int) -> None:
    storage = file_with(4095, place, MIB // 2 + 4096)
    assert not is_zero(storage, 4096, MIB // 2)
    write_zeros(storage, 4096, MIB // 2)
    assert is_zero(storage, 4096, MIB // 2)
    assert storage.operations["write"] == 1
    assert storage.bytes == file_with(4095, MIB // 2 + 4096).bytes  # what is beside it stays


def test_a_hole_costs_nothing() -> None:
    storage = file_with()
    assert is_zero(storage, 0, MIB)
    write_zeros(storage, 0, 2 * MIB)
    assert (storage.operations["read"], storage.operations["write"], len(storage.bytes)) == (0, 0, MIB)
