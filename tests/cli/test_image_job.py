"""Jobs of a mounted image on the command line: without a mount, the words about one, and another server."""

from __future__ import annotations

from typing import Any, Self

import pytest

from qedfs.cli.image_job import JobOrder, is_running, progress_words
from qedfs.control.qmp.client import Gone
from qedfs.errors import QedfsError, TimedOut


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
            job = {"type": "defrag", "state": state, "done": 0, "total": 1, "reason": None}
            return {"images": [{"name": "disk.raw", "job": job}]}
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


class Successor(Server):
    """Another server than the one that a command was sent to. It has no job, or one that cannot end."""

    taken_over = True

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command in ("x-qedfs-cancel", "x-qedfs-pause") and self.taken_over:
            raise QedfsError("disk.raw: has no defrag")
        return super().execute(command, **arguments) if command == "x-qedfs-status" else {}


def order(command: str | None) -> JobOrder:
    return JobOrder("mnt", "disk.raw", "defrag", stays="what is in order stays so", ended="in order", command=command)


def test_a_job_that_has_ended_with_its_server_is_cancelled_and_cannot_be_paused() -> None:
    order("cancel")._control(Successor("off", "off"), "disk.raw")  # type: ignore[arg-type]
    with pytest.raises(QedfsError, match="the defrag has ended with its server; what is in order stays so"):
        order("pause")._control(Successor("off"), "disk.raw")  # type: ignore[arg-type]
    with pytest.raises(QedfsError, match="has no defrag"):
        order("pause")._control(Successor("running"), "disk.raw")  # type: ignore[arg-type]


def test_it_tells_of_a_job_that_cannot_end_yet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qedfs.cli.image_job.CANCEL_SECONDS", 0)
    server = Successor("running")
    server.taken_over = False
    order("cancel")._control(server, "disk.raw")  # type: ignore[arg-type]
    assert (
        "disk.raw: the defrag ends later: its last request to a disk has not been answered" in capsys.readouterr().err
    )


def test_it_is_given_up_if_it_gets_no_further_with_any_server(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def next_server(_: str) -> Server:
        now[0] += 10
        return Server("running")

    monkeypatch.setattr("qedfs.cli.takeovers.time.monotonic", lambda: now[0])
    monkeypatch.setattr("qedfs.cli.image_job.POLL_SECONDS", 0)
    monkeypatch.setattr("qedfs.cli.image_job.connect", next_server)
    with pytest.raises(TimedOut, match="before they had answered"):
        order(None).run(Server("running"), "disk.raw")  # type: ignore[arg-type]
    assert now[0] == 60


class Slow(Server):
    """A server that takes 30 s for each answer, but gives them."""

    def __init__(self, now: list[float], *states: str) -> None:
        super().__init__(*states)
        self._now = now

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        self._now[0] += 30
        return super().execute(command, **arguments)


def test_a_paused_one_is_not_given_up_because_of_an_upgrade_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    servers = iter([Slow(now, *["paused"] * 4), Slow(now, *["paused"] * 4), Slow(now, "paused", "complete")])
    monkeypatch.setattr("qedfs.cli.takeovers.time.monotonic", lambda: now[0])
    monkeypatch.setattr("qedfs.cli.image_job.POLL_SECONDS", 0)
    monkeypatch.setattr("qedfs.cli.image_job.connect", lambda _: next(servers))
    order(None).run(Slow(now, *["paused"] * 4), "disk.raw")  # type: ignore[arg-type]
    assert next(servers, None) is None
