"""How the rules for holding off are written."""

from __future__ import annotations

import pytest

from qedfs.errors import UsageError
from qedfs.jobs.rules import parse_between, parse_delay


def test_a_window_may_span_midnight() -> None:
    assert parse_between("22:00-06:30") == (22 * 60, 6 * 60 + 30)


def test_a_delay_may_be_a_range() -> None:
    assert (parse_delay("30s"), parse_delay("30s-2m")) == ((30, 30), (30, 120))


@pytest.mark.parametrize("text", ["", "25:00-06:00", "01:60-02:00", "06:00", "06:00-06:00", "a-b", "1-2"])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(UsageError):
        parse_between(text)


@pytest.mark.parametrize("text", ["", "x", "90s-30s", "-", "10s-"])
def test_what_is_no_delay(text: str) -> None:
    with pytest.raises(UsageError):
        parse_delay(text)
