"""`qedfs defrag` where there is no mount, and the words about one that is at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest

from qedfs.cli.commands.defrag import _run, _runs, _words
from qedfs.control.qmp.client import Gone
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


class Server:
    """A server that tells these states of the job one after the other, and then is gone."""

    def __init__(self, *states: str) -> None:
        self.started: list[dict[str, Any]] = []
        self._states = iter(states)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "x-qedfs-start":
            self.started.append(arguments)
            return {}
        for state in self._states:
            return {"images": [{"name": "disk.raw", "job": {"type": "defrag", "state": state}}]}
        raise Gone("the mount has ended")


def test_it_begins_anew_with_the_server_that_takes_the_mount_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Server("running"), Server("running", "complete")
    monkeypatch.setattr("qedfs.cli.commands.defrag.POLL_SECONDS", 0)
    monkeypatch.setattr("qedfs.cli.commands.defrag.connect", lambda _: second)
    _run(first, "disk.raw", "mnt", 4096, quiet=False)  # type: ignore[arg-type]
    assert first.started == second.started
    assert second.started == [{"device": "disk.raw", "type": "defrag", "limit": 4096}]
    assert "another server has taken the mount over" in capsys.readouterr().err
