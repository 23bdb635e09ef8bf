"""Every way in which the scripted servers misbehave, through a real mount: no wrong byte is read or kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import contrast, hostile
from tests.faults.farm import Row, all_rows


def _assert_unharmed(outcomes: list[hostile.Outcome]) -> None:
    harmed = {outcome.row.name: (outcome.wrong, outcome.reason) for outcome in outcomes if outcome.wrong}
    assert not harmed


# What is always tried, and what has to become of it.
EXPECTED = {
    Row("http", "ok", "later"): hostile.RIGHT,
    Row("nbd", "correct", "first"): hostile.RIGHT,
    # Each way of sending bytes from elsewhere, or too few.
    Row("http", "wrong-start", "later"): hostile.FAILED,
    Row("http", "ignore-range", "later"): hostile.FAILED,
    Row("http", "short-body", "later"): hostile.FAILED,
    Row("http", "silence", "first"): hostile.FAILED,
    Row("nbd", "chunk-before", "first"): hostile.FAILED,
    Row("nbd", "chunks-overlapping", "first"): hostile.FAILED,
    Row("nbd", "bytes-missing", "first"): hostile.FAILED,
    Row("nbd", "hole-outside", "first"): hostile.FAILED,
    Row("nbd", "deaf", "later"): hostile.FAILED,
    # Another version.
    Row("http", "other-etag", "later"): hostile.CHANGED,
    Row("http", "other-date", "later"): hostile.CHANGED,
    Row("http", "wrong-total", "later"): hostile.CHANGED,
    # On the way to where clouds serve credentials.
    Row("http", "redirect-302", "later"): hostile.FORBIDDEN,
}


def test_hostile_answers(tmp_path: Path) -> None:
    """A sixteenth of both tables; `--slow` and contrib/hostile go through all of them."""
    rows = list(dict.fromkeys([*EXPECTED, *all_rows()[::16]]))
    outcomes = hostile.run(tmp_path, rows, timeout="1s")
    _assert_unharmed(outcomes)
    found = {outcome.row: outcome.hostile for outcome in outcomes if outcome.row in EXPECTED}
    assert found == EXPECTED


@pytest.mark.slow
def test_all_hostile_answers(tmp_path: Path) -> None:
    outcomes = hostile.run(tmp_path, all_rows())
    assert len(outcomes) > 250
    _assert_unharmed(outcomes)


def test_a_lie_that_others_believe(tmp_path: Path) -> None:
    assert contrast.told_to_qemu_io("elsewhere") == "wrong bytes"
    assert contrast.told_to_qedfs("elsewhere", tmp_path / "qedfs") == "error"
