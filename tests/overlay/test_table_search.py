"""The search for data and holes in a table, beside one that looks at each entry."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.table_search import next_data, next_hole

# An entry whose low byte is that of a zero cluster is invalid: reading it fails, so it must not look like a hole.
INVALID = 0x10000 + ZERO
runs = st.lists(st.tuples(st.sampled_from((MISSING, ZERO, 0x10000, 1 << 63, INVALID)), st.integers(1, 40)), max_size=8)


@given(runs, st.integers(0, 300), st.integers(0, 300), st.booleans())
def test_it_finds_what_a_look_at_each_entry_finds(
    made: list[tuple[int, int]], start: int, stop: int, missing_is_hole: bool
) -> None:
    part = array("Q", [entry for entry, count in made for _ in range(count)])
    stop = min(stop, len(part))
    start = min(start, stop)
    holes = (ZERO, MISSING) if missing_is_hole else (ZERO,)
    wanted = [index for index in range(start, stop) if part[index] in holes]
    others = [index for index in range(start, stop) if part[index] not in holes]
    assert next_hole(part, start, stop, missing_is_hole=missing_is_hole) == next(iter(wanted), stop)
    assert next_data(part, start, stop, missing_is_hole=missing_is_hole) == next(iter(others), stop)
