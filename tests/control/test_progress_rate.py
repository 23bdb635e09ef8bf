"""The pace is that of the last seconds, and what cannot be told is not told."""

from __future__ import annotations

from qedfs.control.monitoring.progress_rate import WINDOW_SECONDS, Rate


def test_nothing_is_known_at_first() -> None:
    rate = Rate()
    assert (rate.value, rate.seconds_for(10)) == (0.0, None)
    rate.note(0.0, 5)
    assert (rate.value, rate.seconds_for(10)) == (0.0, None)


def test_the_last_seconds_count() -> None:
    rate = Rate()
    for second in range(100):
        rate.note(second, second * 10 if second < 50 else 500 + (second - 50) * 20)
    assert rate.value == 20.0
    assert rate.seconds_for(100) == 5.0
    assert len(rate._samples) <= WINDOW_SECONDS + 2


def test_a_stall_shows_as_no_pace() -> None:
    rate = Rate()
    rate.note(0.0, 0)
    rate.note(1.0, 100)
    for second in range(2, 20):
        rate.note(second, 100)
    assert rate.value == 0.0
    assert rate.seconds_for(1) is None
    assert rate.seconds_for(0) == 0.0


def test_a_new_count_begins_anew() -> None:
    rate = Rate()
    rate.note(0.0, 1000)
    rate.note(1.0, 10)
    rate.note(2.0, 20)
    assert rate.value == 10.0
