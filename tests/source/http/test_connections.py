"""How HttpSource uses its connections: kept, replaced, bounded, dropped."""

from __future__ import annotations

import os

import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.source.http import HttpSource
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.hang import HANG_SECONDS
from tests.source.http.conftest import CONTENT, OpenSource, read, turns, until


async def test_connections_are_kept_and_urgent_reads_have_their_own(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())
    for _ in range(5):
        await read(source, 0, 10)
        await read(source, 0, 10, urgent=True)
    opening, *reads = [request.connection for request in server.requests]
    assert reads == [2, opening] * 5


async def test_a_connection_closed_while_idle_is_replaced_without_a_word(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())
    server.behaviour = "close-after"
    for _ in range(5):
        assert await read(source, 3, 10) == CONTENT[3:13]


async def test_a_connection_that_dies_under_the_request_is_replaced_once(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())
    await read(source, 3, 10)
    server.queue.append("close-at-once")
    assert await read(source, 3, 10) == CONTENT[3:13]
    server.behaviour = "close-at-once"
    with pytest.raises(SourceUnreachable, match="closed without an answer"):
        await read(source, 3, 10)


async def test_a_hundred_reads_at_once_use_at_most_64_connections(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())

    async def check(pos: int) -> None:
        assert await read(source, pos, 5000) == CONTENT[pos : pos + 5000]

    async with trio.open_nursery() as nursery:
        for n in range(100):
            nursery.start_soon(check, n * 9001)
    assert server.connections <= 1 + 64


async def test_an_urgent_read_does_not_wait_for_the_others(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    async with trio.open_nursery() as nursery:
        server.queue.extend(["silence"] * 64)
        for _ in range(70):
            nursery.start_soon(read, source, 0, 10)
        with trio.fail_after(HANG_SECONDS):
            await until(lambda: not server.queue)
            assert await read(source, 7, 10, urgent=True) == CONTENT[7:17]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("behaviour", ["silence", "slow-body"])
async def test_a_cancelled_read_drops_its_connection_and_its_buffer(
    server: FakeHttpServer, open_source: OpenSource, behaviour: str
) -> None:
    source = await open_source(server.url())
    server.behaviour = behaviour
    buffer = bytearray(1000)
    asked = len(server.requests)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.read, 0, memoryview(buffer))
        await until(lambda: len(server.requests) > asked and (behaviour == "silence" or any(buffer)))
        nursery.cancel_scope.cancel()
    before = bytes(buffer)
    server.behaviour = "ok"
    assert await read(source, 500, 10) == CONTENT[500:510]
    cancelled, following = server.requests[-2:]
    assert following.connection != cancelled.connection
    assert buffer == before
    buffer.clear()  # raises if anything still holds a view of it


async def test_closing_ends_reads_in_flight_and_those_that_come_late(
    server: FakeHttpServer, open_source: OpenSource
) -> None:
    source = await open_source(server.url())
    server.behaviour = "silence"
    ended = []

    async def reads() -> None:
        with pytest.raises(SourceUnreachable, match="source was closed"):
            await read(source, 0, 10)
        ended.append(True)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(reads)
        await trio.testing.wait_all_tasks_blocked()
        await source.aclose()
    assert len(ended) == 3
    await source.aclose()
    with pytest.raises(SourceUnreachable, match="source was closed"):
        await read(source, 0, 10)


async def test_the_end_of_the_nursery_ends_reads_elsewhere(server: FakeHttpServer, nursery: trio.Nursery) -> None:
    async def reads(source: HttpSource) -> None:
        with pytest.raises(SourceUnreachable, match="source was closed"):
            await read(source, 0, 10)

    async with trio.open_nursery() as inner:
        source = await HttpSource.open(parse_location(server.url()), Policy(), inner)
        server.behaviour = "silence"
        nursery.start_soon(reads, source)
        await trio.testing.wait_all_tasks_blocked()
        inner.cancel_scope.cancel()
    await reads(source)


async def test_no_descriptor_is_left_and_none_is_inherited(server: FakeHttpServer, nursery: trio.Nursery) -> None:
    def descriptors() -> set[str]:
        return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}

    before = descriptors()
    source = await HttpSource.open(parse_location(server.url()), Policy(), nursery)
    await read(source, 0, 10)
    assert not [fd for fd in descriptors() - before if os.get_inheritable(int(fd))]
    await source.aclose()
    await until(lambda: not descriptors() - before)  # the server closes its ends in threads of its own


async def test_an_idle_source_uses_no_cpu(server: FakeHttpServer, open_source: OpenSource) -> None:
    source = await open_source(server.url())
    server.behaviour = "silence"
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(read, source, 0, 10)
        await until(lambda: [request.method for request in server.requests].count("GET") >= 8)
        with turns() as counted:
            await trio.sleep(0.3)
        # A loop that spins has thousands. libcurl has timers of its own, which end now and then.
        assert counted.count < 100
        nursery.cancel_scope.cancel()
