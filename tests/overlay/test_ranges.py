"""Ranges of numbers: as a set of the numbers, in memory for the gaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qedfs.overlay.ranges import Ranges


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=12))
def test_ranges_are_as_a_set(adds: list[tuple[int, int]]) -> None:
    ranges, marked = Ranges(), set[int]()
    for start, length in adds:
        if ranges.end_of(start) is not None:
            continue
        end = ranges.next_from(start, start + length)
        assert end == next((n for n in range(start, start + length) if n in marked), start + length)
        ranges.add(start, end)
        marked |= set(range(start, end))
        for number in range(60):
            expected = next((n for n in range(number, 61) if n not in marked), 61) if number in marked else None
            assert ranges.end_of(number) == expected


def test_ranges_that_meet_are_one() -> None:
    ranges = Ranges()
    for start in (0, 20, 10):
        ranges.add(start, start + 10)
    assert ranges.end_of(0) == 30
    assert ranges.next_from(30, 99) == 99
