"""Table entries and their bytes."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.format import tables
from qedfs.format.tables import MISSING, ZERO, decode_table, empty_table, encode_table

entries = st.lists(st.integers(0, (1 << 64) - 1), max_size=100)


@given(entries)
def test_entries_are_little_endian(values: list[int]) -> None:
    data = struct.pack(f"<{len(values)}Q", *values)
    assert list(decode_table(data)) == values
    assert encode_table(array("Q", values)) == data
    assert decode_table(memoryview(bytearray(data))) == decode_table(data)


@given(entries)
def test_on_a_big_endian_machine_the_bytes_are_swapped(values: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_SWAP", True)
        data = encode_table(array("Q", values))
        assert data == struct.pack(f">{len(values)}Q", *values)
        assert list(decode_table(data)) == values


def test_an_empty_table_is_all_missing() -> None:
    assert list(empty_table(3)) == [MISSING] * 3
    assert (MISSING, ZERO) == (0, 1)


def test_a_part_of_an_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiple"):
        decode_table(bytes(9))
