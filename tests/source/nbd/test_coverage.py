"""Which bytes of a reply have come: as a set of positions would have it, and what no honest server sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.source.nbd.coverage import MAX_PIECES, Coverage
from qedfs.source.nbd.protocol import Violation


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=20))
def test_as_a_set_of_positions(ranges: list[tuple[int, int]]) -> None:
    coverage, seen = Coverage(), set[int]()
    for start, size in ranges:
        piece = set(range(start, start + size))
        if piece & seen:
            with pytest.raises(Violation, match="twice"):
                coverage.add(start, start + size)
            return
        coverage.add(start, start + size)
        seen |= piece
        assert coverage.total == len(seen)


def test_pieces_in_any_order_that_touch_are_one() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        coverage = Coverage()
        for number in order:
            coverage.add(10 * number, 10 * number + 10)
        assert coverage.total == 30
        with pytest.raises(Violation, match="twice"):
            coverage.add(29, 31)


def test_too_many_scattered_pieces_are_an_attack() -> None:
    coverage = Coverage()
    for number in range(MAX_PIECES):
        coverage.add(2 * number, 2 * number + 1)
    coverage.add(1, 2)  # closes a gap
    coverage.add(2 * MAX_PIECES, 2 * MAX_PIECES + 1)
    with pytest.raises(Violation, match="scattered"):
        coverage.add(2 * MAX_PIECES + 2, 2 * MAX_PIECES + 3)
