"""Faults inside libcurl's callbacks end the transfers concerned, and nothing else."""

from __future__ import annotations

import errno
import functools
import math
import select
import threading
from typing import Any

import pycurl
import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.source.http import version
from qedfs.source.http.multi import Multi
from qedfs.source.policy import Policy
from tests.fakes.http_behaviours import BEHAVIOURS, Exchange
from tests.fakes.http_server import FakeHttpServer
from tests.harness.hang import HANG_SECONDS
from tests.source.http.conftest import CONTENT, OpenSource, read, until

REAL_EPOLL = select.epoll
STEP = 100_000  # bytes of a body that is sent in steps


class FailingEpoll:
    """An epoll object that refuses to watch sockets while `broken` is set."""

    broken = False

    def __init__(self) -> None:
        self._epoll = REAL_EPOLL()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def register(self, fd: int, events: int) -> None:
        if FailingEpoll.broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._epoll.register(fd, events)


async def test_a_socket_that_cannot_be_watched(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "epoll", FailingEpoll)
    source = await open_source(server.url())
    monkeypatch.setattr(FailingEpoll, "broken", True)
    with trio.fail_after(HANG_SECONDS), pytest.raises(SourceUnreachable, match="no space left on device"):
        await read(source, 0, 10)
    monkeypatch.setattr(FailingEpoll, "broken", False)
    assert await read(source, 0, 10) == CONTENT[:10]


async def test_a_bug_in_the_judge_is_raised_by_the_read_that_met_it(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = await open_source(server.url())

    def broken(*_args: object) -> None:
        raise ZeroDivisionError("bug")

    with monkeypatch.context() as patch:
        patch.setattr(version, "judge_range", broken)
        with pytest.raises(ZeroDivisionError, match="bug"):
            await read(source, 0, 10)
    assert await read(source, 0, 10) == CONTENT[:10]
    assert capfd.readouterr().err == ""


async def test_a_bug_in_the_policy_is_raised_by_the_read_that_met_it(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await open_source(server.url())

    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(Policy, "check_address", broken)
    with pytest.raises(ZeroDivisionError, match="bug"):
        await read(source, 0, 10)  # needs a new connection, of the other pool
    assert await read(source, 0, 10, urgent=True) == CONTENT[:10]


async def test_libcurl_refusing_a_call_fails_the_flights(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await open_source(server.url())
    pool = source._background._multi
    real = pool._multi

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def socket_action(self, fd: int, bits: int) -> Any:
            raise pycurl.error(4, "canary")  # CURLM_INTERNAL_ERROR

    monkeypatch.setattr(pool, "_multi", Refusing())
    with pytest.raises(SourceUnreachable) as caught:
        await read(source, 0, 10)
    assert "canary" not in str(caught.value)
    monkeypatch.setattr(pool, "_multi", real)
    assert await read(source, 0, 10) == CONTENT[:10]


async def test_a_deadline_that_runs_out_early_is_set_again(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    server.behaviour = "silence"
    pump = source._background._multi
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, source, 0, 10)
        await until(lambda: len(server.requests) == 2)
        for _ in range(3):
            pump._set_deadline(0.0)
            await until(lambda: pump._deadline > 0)
            assert pump._deadline < math.inf
        nursery.cancel_scope.cancel()


async def test_a_name_look_up_that_holds_libcurl_does_not_hold_the_program(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await open_source(server.url())
    pool = source._background._multi
    real, release, closed = pool._multi, threading.Event(), threading.Event()

    class Slow:
        def close(self) -> None:
            release.wait(HANG_SECONDS)
            real.close()
            closed.set()

    monkeypatch.setattr(pool, "_multi", Slow())
    await source.aclose()
    assert not closed.is_set()
    release.set()
    await until(closed.is_set)


async def test_bytes_gather_until_somebody_waits(
    server: FakeHttpServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is received meanwhile, however many pieces arrive, and urgent reads do not take part."""
    sent: list[int] = []
    go_on = threading.Semaphore(0)

    def in_steps(exchange: Exchange) -> None:
        first, last, fields = exchange.asked()
        exchange.send("206 Partial Content", {**fields, "Content-Length": str(last - first + 1)})
        for at in range(first, last + 1, STEP):
            exchange.sock.sendall(server.content[at : min(at + STEP, last + 1)])
            sent.append(at)
            go_on.acquire()

    def has_sent(pieces: int) -> bool:
        return len(sent) == pieces

    monkeypatch.setitem(BEHAVIOURS, "in-steps", in_steps)
    source = await open_source(server.url())
    for urgent in (True, False):
        await read(source, 0, 10, urgent=urgent)  # so that there are connections
    # libcurl's own timers end a sleep, too.
    monkeypatch.setattr(Multi, "_set_deadline", lambda multi, _seconds: None)
    source._background._multi._deadline = math.inf
    source.gather(math.inf)
    server.queue.append("in-steps")
    found: list[bytes] = []

    async def background() -> None:
        found.append(await read(source, 0, len(CONTENT)))

    received = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background)
            for pieces in range(1, 7):
                await until(functools.partial(has_sent, pieces))
                assert await read(source, 5, 100_000, urgent=True) == CONTENT[5:100_005]
                received.append(source._background.received)
                go_on.release()
            # The pump may have waited for the first one already.
            assert received[1:] == received[1:2] * 5
            source.gather(0)
            go_on.release(len(CONTENT))
    finally:
        go_on.release(len(CONTENT))
    assert found == [CONTENT]
