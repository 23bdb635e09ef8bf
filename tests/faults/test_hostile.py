"""Every way in which the scripted servers misbehave, through a real mount: no wrong byte is read or kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import contrast, hostile
from tests.faults.farm import Row, all_rows


def _assert_unharmed(outcomes: list[hostile.Outcome]) -> None:
    harmed = {outcome.row.name: (outcome.wrong, outcome.reason) for outcome in outcomes if outcome.wrong}
    assert not harmed


def test_hostile_answers(tmp_path: Path) -> None:
    """HTTP servers that turn bad after a good start, NBD servers that are bad from the start."""
    rows = [row for row in all_rows() if row.when == {"http": "later", "nbd": "first"}[row.protocol]]
    outcomes = hostile.run(tmp_path, rows, timeout="1s")
    _assert_unharmed(outcomes)
    by_row = {outcome.row: outcome for outcome in outcomes}
    for name in ("wrong-start", "ignore-range", "short-body", "reset", "status-503"):
        assert by_row[Row("http", name, "later")].hostile == hostile.FAILED
    for name in ("chunk-before", "chunks-overlapping", "bytes-missing", "hole-outside"):
        assert by_row[Row("nbd", name, "first")].hostile == hostile.FAILED
    for name in ("other-etag", "other-date", "wrong-total"):
        assert by_row[Row("http", name, "later")].hostile == hostile.CHANGED
    # What is on its way to where clouds serve credentials never gets there.
    assert by_row[Row("http", "redirect-302", "later")].hostile == hostile.FORBIDDEN
    assert by_row[Row("http", "ok", "later")].hostile == hostile.RIGHT
    assert by_row[Row("nbd", "correct", "first")].hostile == hostile.RIGHT


@pytest.mark.slow
def test_all_hostile_answers(tmp_path: Path) -> None:
    outcomes = hostile.run(tmp_path, all_rows())
    assert len(outcomes) > 250
    _assert_unharmed(outcomes)


@pytest.mark.parametrize("lie", ["whole", "elsewhere"])
def test_lies_that_others_believe(tmp_path: Path, lie: str) -> None:
    assert contrast.told_to_qemu_io(lie) == "wrong bytes"
    assert contrast.told_to_qedfs(lie, tmp_path / "qedfs") == "error"
