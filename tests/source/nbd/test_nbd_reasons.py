"""What stood in the way of an answer over NBD, as it is counted: each kind of trouble under its own name."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from qedfs.errors import Reason, SourceUnreachable
from qedfs.source.nbd.client import NbdSource
from qedfs.source.url import parse_location
from tests.fakes.nbd_behaviours import BEHAVIOURS, READING
from tests.fakes.nbd_server import FakeNbd
from tests.harness.process import free_port
from tests.source.nbd.support import ANY_SOCKET, MiB, opened, read, serving, serving_on_mock_clock, sparse_content

CONTENT = sparse_content(MiB)
CUT = {"hangs-up", "cut-in-header", "cut-in-payload"}
SERVER = {"EIO", "EIO-after-data", "EIO-simple", "ENOMEM", "ENOSPC", "ESHUTDOWN"}


def _expected(name: str) -> Reason:
    return Reason.CUT if name in CUT else Reason.SERVER if name in SERVER else Reason.ANSWER


@pytest.mark.parametrize("name", [name for name, behaviour in READING.items() if not behaviour.permanent])
async def test_of_a_read(name: str, autojump_clock: trio.testing.MockClock) -> None:
    async with serving_on_mock_clock(FakeNbd(CONTENT, BEHAVIOURS[name])) as url, opened(url) as source:
        with pytest.raises(SourceUnreachable) as caught:
            await read(source, 65536, 16384)
        assert caught.value.reason is _expected(name)


async def test_of_silence(autojump_clock: trio.testing.MockClock) -> None:
    async with serving_on_mock_clock(FakeNbd(CONTENT, BEHAVIOURS["silent"])) as url, opened(url) as source:
        with pytest.raises(SourceUnreachable) as caught:
            await read(source, 0, 4096)
        assert caught.value.reason is Reason.TIMEOUT


@pytest.mark.parametrize(
    ("name", "reason"), [("deaf", Reason.TIMEOUT), ("greeting-cut", Reason.CONNECT), ("shutting-down", Reason.SERVER)]
)
async def test_of_an_opening(name: str, reason: Reason, autojump_clock: trio.testing.MockClock) -> None:
    async with serving_on_mock_clock(FakeNbd(CONTENT, BEHAVIOURS[name])) as url:
        assert await _reason_of_opening(url) is reason


async def test_of_a_server_that_is_not_there() -> None:
    assert await _reason_of_opening(f"nbd://127.0.0.1:{free_port()}/") is Reason.CONNECT


async def test_all_who_wait_for_one_attempt_to_connect_are_told_the_reason() -> None:
    fake = FakeNbd(CONTENT)
    reasons: list[Reason] = []

    async def try_to_read() -> None:
        with pytest.raises(SourceUnreachable) as caught:
            await read(source, 0, 4096)
        reasons.append(caught.value.reason)

    async with trio.open_nursery() as nursery, serving(fake) as url, opened(url) as source:
        fake.behaviour = BEHAVIOURS["shutting-down"]
        fake.hang_up()
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with trio.open_nursery() as readers:
            for _ in range(3):
                readers.start_soon(try_to_read)
        nursery.cancel_scope.cancel()
    assert reasons == [Reason.SERVER] * 3


async def _reason_of_opening(url: str) -> Reason:
    with pytest.RaisesGroup(SourceUnreachable) as caught:
        async with opened(url):
            pytest.fail("it opened")
    error = caught.value.exceptions[0]
    assert isinstance(error, SourceUnreachable)
    return error.reason


async def test_a_socket_that_is_not_there_and_one_where_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    url = f"nbd+unix:///disk?socket={path}"
    await _no_server(url, f"there is no socket {path}; is the server running?")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        await _no_server(url, f"nobody listens at the socket {path}; is the server running?")


async def _no_server(url: str, says: str) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(SourceUnreachable) as caught:
            await NbdSource.open(parse_location(url), ANY_SOCKET, nursery)
    assert str(caught.value) == f"{url}: {says}"
    assert caught.value.reason is Reason.CONNECT
