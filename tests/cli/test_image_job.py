"""Jobs of a mounted image on the command line: without a mount, the words about one, and another server."""

from __future__ import annotations

from typing import Any, Self

import pytest

from qedfs.cli.image_job import JobOrder, is_running, progress_words
from qedfs.control.qmp.client import Gone


def test_it_says_how_far_it_is_and_what_it_waits_for() -> None:
    job = {"done": 30, "total": 40, "state": "running", "reason": None}
    assert progress_words(job) == "75%"
    assert progress_words({**job, "state": "waiting", "reason": "the disk is busy"}) == "75%, waiting: the disk is busy"
    assert progress_words({**job, "done": 0, "total": 0}) == "100%"


def test_only_one_that_has_not_ended_can_get_another_limit() -> None:
    states = ("off", "waiting", "running", "paused", "complete", "failed")
    jobs = [{"job": {"type": "defrag", "state": state}} for state in states]
    assert [is_running(job, "defrag") for job in jobs] == [False, True, True, True, False, False]
    assert not is_running({"job": None}, "defrag")


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
    monkeypatch.setattr("qedfs.cli.image_job.POLL_SECONDS", 0)
    monkeypatch.setattr("qedfs.cli.image_job.connect", lambda _: second)
    order = JobOrder("mnt", "disk.raw", "defrag", stays="what is in order stays so", ended="in order", limit=4096)
    order.run(first, "disk.raw")  # type: ignore[arg-type]
    assert first.started == second.started
    assert second.started == [{"device": "disk.raw", "type": "defrag", "limit": 4096}]
    assert "another server has taken the mount over" in capsys.readouterr().err
