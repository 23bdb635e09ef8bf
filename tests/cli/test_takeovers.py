"""Commands while one server takes over from another. With real ones: `tests/mount/test_holder_default.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest

from qedfs.cli import takeovers
from qedfs.cli.plain import status, wait
from qedfs.control.qmp.client import Client, Gone, NotServed
from qedfs.errors import NotMounted, TimedOut


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which goes on by a second with each look."""
    now = [100.0]

    def sleep(_: float) -> None:
        now[0] += 1

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(
        "qedfs.cli.mount_table.not_served", lambda place: NotMounted(f"{place}: nothing is mounted there")
    )
    return iter([now])


def answering(monkeypatch: pytest.MonkeyPatch, *answers: object, between: bool = True) -> None:
    monkeypatch.setattr(takeovers, "is_between_servers", lambda _: between)
    monkeypatch.setattr(Client, "connect", Mock(side_effect=answers))


NONE = NotServed("no qedfs mount answers there")


@pytest.mark.usefixtures("clock")
def test_a_command_waits_for_the_next_server(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Mock()
    answering(monkeypatch, NONE, NONE, client)
    assert takeovers.reach_server("/mnt") is client


@pytest.mark.usefixtures("clock")
def test_where_none_will_come_it_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, NONE, between=False)
    with pytest.raises(NotMounted, match="nothing is mounted there"):
        takeovers.reach_server("/mnt")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("deadline", [103.0, float("inf")])
def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, deadline: float) -> None:
    answering(monkeypatch, *[NONE] * 100)
    with pytest.raises(TimedOut, match="another server takes the mount over, and does not answer yet"):
        takeovers.reach_server("/mnt", deadline=deadline)


def test_a_wait_goes_on_at_the_next_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "connect", Mock(return_value=Mock(__enter__=Mock(), __exit__=Mock(return_value=None))))
    monkeypatch.setattr(wait, "is_between_servers", lambda _: True)
    waiting = Mock(run=Mock(side_effect=[Gone("the mount has ended"), None]))
    wait._wait_at(waiting)
    assert waiting.run.call_count == 2


def test_a_wait_at_a_mount_that_ends_meanwhile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Mock(return_value=Mock(__enter__=Mock(), __exit__=Mock(return_value=None)))
    connect.side_effect = [connect.return_value, NotMounted("nothing is mounted there")]
    monkeypatch.setattr(wait, "connect", connect)
    monkeypatch.setattr(wait, "is_between_servers", lambda _: True)
    with pytest.raises(Gone, match="the mount has ended"):
        wait._wait_at(Mock(run=Mock(side_effect=Gone("the mount has ended"))))


def test_a_status_that_was_broken_off_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Mock(execute=Mock(side_effect=[Gone("the mount has ended"), {"images": []}]))
    monkeypatch.setattr(
        status, "connect", Mock(return_value=Mock(__enter__=lambda _: client, __exit__=Mock(return_value=None)))
    )
    monkeypatch.setattr(status, "is_between_servers", lambda _: True)
    status.status("/mnt", as_json=True)
    assert '"images": []' in capsys.readouterr().out


class Lasting(takeovers.LastingClient):
    """A client whose servers give these answers, or end."""

    def __init__(self, *answers: object) -> None:
        super().__init__(Mock())
        self.mountpoint = "/mnt"
        self._answers = iter(answers)

    def _answer(self, request_id: int | None) -> dict[str, object]:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return {"return": answer}


def test_a_state_is_asked_for_again_at_the_next_server(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, NONE, Lasting())
    monkeypatch.setattr(time, "sleep", lambda _: None)
    client = Lasting(Gone("the mount has ended"), {"size": 512})
    assert client.execute("block_resize", device="disk", size=512) == {"size": 512}


def test_a_request_at_which_two_servers_have_ended_is_not_sent_to_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, NONE, Lasting())
    monkeypatch.setattr(takeovers, "is_between_servers", lambda _: True)
    gone = Gone("the mount has ended")
    with pytest.raises(takeovers.Unanswered, match="whether this was done is not known"):
        Lasting(gone, gone, {"size": 512}).execute("block_resize", device="disk", size=512)


@pytest.mark.parametrize("command", ["x-qedfs-snapshot", "x-qedfs-populate", "blockdev-set-active", "x-qedfs-upgrade"])
def test_of_a_step_nobody_knows_whether_it_was_done(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(takeovers, "is_between_servers", lambda _: True)
    with pytest.raises(takeovers.Unanswered, match="serves the mount on; whether this was done is not known"):
        Lasting(Gone("the mount has ended")).execute(command)


def test_a_mount_that_has_ended_is_said_to_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeovers, "is_between_servers", lambda _: False)
    with pytest.raises(Gone, match="the mount has ended"):
        Lasting(Gone("the mount has ended")).execute("block_resize", size=512)


def test_servers_that_end_one_after_the_other_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    patience = takeovers.Patience()
    patience.ended("/mnt")
    now[0] += takeovers.GIVE_UP_SECONDS - 1
    patience.ended("/mnt")
    patience.answered()
    now[0] += 2
    patience.ended("/mnt")
    now[0] += takeovers.GIVE_UP_SECONDS
    with pytest.raises(TimedOut, match="for 60 s its servers have ended"):
        patience.ended("/mnt")


@pytest.mark.parametrize("command", [status.status, wait.wait])
def test_a_command_ends_that_every_server_ends_on(
    command: Callable[[str], None], clock: Iterator[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = next(clock)

    def connected(*_: object, **__: object) -> Client:
        now[0] += 10
        raise Gone("the mount has ended")

    for module in (status, wait):
        monkeypatch.setattr(module, "is_between_servers", lambda _: True)
        monkeypatch.setattr(module, "connect", connected)
    with pytest.raises(TimedOut, match="before they had answered"):
        command("/mnt")
