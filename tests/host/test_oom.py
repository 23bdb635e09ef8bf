"""What a server makes of a score that it has inherited."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.host.oom import stay_killable


@pytest.mark.parametrize(
    ("inherited", "expected"),
    [("-1000\n", "-500\n"), ("-999\n", "-999\n"), ("0\n", "0\n"), ("200\n", "200\n"), ("garbage", "garbage")],
)
def test_only_a_server_that_would_never_be_ended_changes_it(tmp_path: Path, inherited: str, expected: str) -> None:
    score = tmp_path / "oom_score_adj"
    score.write_text(inherited)
    stay_killable(score)
    assert score.read_text() == expected


def test_a_kernel_without_scores_is_no_trouble(tmp_path: Path) -> None:
    stay_killable(tmp_path / "none")
    assert not (tmp_path / "none").exists()
