"""`qedfs defrag` where there is no mount, and the words about one that is at work."""

from __future__ import annotations

from pathlib import Path

from qedfs.cli.commands.defrag import _runs, _words
from tests.harness.mounts import qedfs


def test_a_control_goes_without_the_options_of_a_start(tmp_path: Path) -> None:
    for option in ("--no-wait", "--limit=1M"):
        done = qedfs("defrag", tmp_path, "disk", "--pause", option, check=False)
        assert (done.returncode, done.stderr) == (2, "qedfs: --pause goes without --limit and --no-wait\n")


def test_without_a_mount_it_says_so(tmp_path: Path) -> None:
    assert qedfs("defrag", tmp_path, "disk", check=False).returncode == 10


def test_it_says_how_far_it_is_and_what_it_waits_for() -> None:
    job = {"done": 30, "total": 40, "state": "running", "reason": None}
    assert _words(job) == "75%"
    assert _words({**job, "state": "waiting", "reason": "the disk is busy"}) == "75%, waiting: the disk is busy"
    assert _words({**job, "done": 0, "total": 0}) == "100%"


def test_only_one_that_has_not_ended_can_get_another_limit() -> None:
    states = ("off", "waiting", "running", "paused", "complete", "failed")
    jobs = [{"job": {"type": "defrag", "state": state}} for state in states]
    assert [_runs(job) for job in jobs] == [False, True, True, True, False, False]
    assert not _runs({"job": None})
