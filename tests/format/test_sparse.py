"""A sparse table: entry by entry as a plain list would have it, and no larger than what is in it."""

from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from qedfs.format.sparse import PAGE_BYTES, PAGE_ENTRIES, SparseTable
from qedfs.format.tables import decode_table, encode_table

LENGTH = 3 * PAGE_ENTRIES + 7


@given(st.dictionaries(st.integers(0, LENGTH - 1), st.integers(0, 1 << 62), max_size=20), st.integers(0, LENGTH - 1))
def test_as_a_plain_list(entries: dict[int, int], first: int) -> None:
    table, plain = SparseTable(LENGTH), [0] * LENGTH
    for index, entry in entries.items():
        table[index] = plain[index] = entry
    assert len(table) == LENGTH
    assert [table[index] for index in range(LENGTH)] == plain
    assert table.held_bytes <= PAGE_BYTES * len({index // PAGE_ENTRIES for index in entries})
    expected = next((index for index in range(first, LENGTH) if plain[index]), LENGTH)
    assert table.next_filled(first, LENGTH) == expected
    count = min(9, PAGE_ENTRIES - first % PAGE_ENTRIES)
    assert table.part(first, count).tolist() == plain[first : first + count]


def test_a_look_for_an_entry_is_bounded_and_goes_on_where_it_stopped() -> None:
    table = SparseTable(LENGTH)
    table[0] = table[LENGTH - 1] = 5
    assert table.next_filled(1, 100) == 101
    at, looks = 1, 0
    while not table[at]:
        at, looks = table.next_filled(at, 100), looks + 1
    assert at == LENGTH - 1
    # The two pages between that are not there cost nothing.
    assert looks == 6


def test_pages_of_zeros_of_a_file_are_not_kept() -> None:
    entries = [0] * (2 * PAGE_ENTRIES) + [random.Random(1).randrange(1 << 62) for _ in range(7)]
    table = SparseTable(PAGE_ENTRIES + len(entries))
    table.load(PAGE_ENTRIES, memoryview(encode_table(array("Q", entries))), decode_table)
    assert [first for first, _ in table.filled_pages()] == [3 * PAGE_ENTRIES]
    assert table.part(3 * PAGE_ENTRIES, 100).tolist() == entries[-7:]
