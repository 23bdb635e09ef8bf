"""The figures of an image: what counts as kept."""

from __future__ import annotations

from qedfs.image.counters import Counters


def test_what_was_kept_is_all_that_was_adopted() -> None:
    assert Counters().kept == 0
    assert Counters(read=5, missed=3, kept_asked=1, kept_stream=2).kept == 3
