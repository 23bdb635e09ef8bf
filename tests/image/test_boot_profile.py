"""The list of what readers waited for, and its file."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import UsageError
from qedfs.image.boot_profile import FIRST_LINE, MOST_RANGES, Range, ReadTrace, parsed, written

RANGES = st.lists(st.tuples(st.integers(0, 1 << 61), st.integers(1, 1 << 61)), max_size=50)


@given(RANGES)
def test_what_is_written_is_read(ranges: list[Range]) -> None:
    assert parsed(written(ranges, "of disk.raw"), "p") == tuple(ranges)


def test_what_follows_at_once_is_one_range() -> None:
    waits = ReadTrace()
    for pos, size in ((0, 4096), (4096, 8192), (1 << 20, 512), (12288, 1)):
        waits.note(pos, size)
    assert waits.ranges == [(0, 12288), (1 << 20, 512), (12288, 1)]


def test_the_list_is_bounded_and_keeps_the_beginning() -> None:
    waits = ReadTrace()
    tracemalloc.start()
    try:
        for number in range(MOST_RANGES + 10):
            waits.note(2 * number, 1)
        assert tracemalloc.get_traced_memory()[0] < 24 * MOST_RANGES  # each of the images of a mount has one
    finally:
        tracemalloc.stop()
    assert len(waits.ranges) == MOST_RANGES
    assert waits.ranges[0] == (0, 1)
    assert parsed(written(waits.ranges, ""), "p") == tuple(waits.ranges)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "p: is not a profile; qedfs profile makes one"),
        ("0 4096\n", "p: is not a profile; qedfs profile makes one"),
        (f"{FIRST_LINE}\n# x\n0\n", "p: line 3 is not a position and a size in bytes"),
        (f"{FIRST_LINE}\n0 0\n", "p: line 2 is not a position and a size in bytes"),
        (f"{FIRST_LINE}\n-1 4\n", "p: line 2 is not a position and a size in bytes"),
        (f"{FIRST_LINE}\n1 ٤\n", "p: line 2 is not a position and a size in bytes"),
        (f"{FIRST_LINE}\n{1 << 62} 1\n", "p: line 2 is not a position and a size in bytes"),
        (f"{FIRST_LINE}\n" + "0 1\n" * (MOST_RANGES + 1), f"p: has {MOST_RANGES + 1} ranges, more than {MOST_RANGES}"),
    ],
    ids=["empty", "first-line", "one-number", "no-size", "negative", "other-digits", "too-far", "too-many"],
)
def test_what_is_no_profile_is_refused_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(text, "p")
    assert str(caught.value) == complaint
