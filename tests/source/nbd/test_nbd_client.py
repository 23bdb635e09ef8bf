"""Which connection carries what, what happens when one dies, and cancellation, step by step."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing

from qedfs.errors import Refused, SourceChanged, SourceError, SourceUnreachable
from qedfs.source.nbd.client import MAX_CONNECTIONS, NbdSource
from qedfs.source.nbd.connection import FAREWELL_SECONDS, Connection
from qedfs.source.nbd.protocol import Export, Negotiated, RequestType, encode_request
from qedfs.source.nbd.reply import Replies
from qedfs.source.policy import Policy
from qedfs.source.samples import BLOCK_BYTES, Samples
from qedfs.source.url import parse_location
from tests.fakes.nbd_behaviours import WELL_BEHAVED
from tests.fakes.nbd_server import CORRECT, READ, Behaviour, Call, FakeNbd
from tests.harness.hang import HANG_SECONDS
from tests.harness.process import free_port
from tests.harness.servers import nbdkit
from tests.source.nbd.support import MiB, opened, read, serving, serving_on_mock_clock, sparse_content

CONTENT = sparse_content(MiB)
CLUSTER = 16 * 1024


class Gate:
    """Holds back the server's answers to reads until it is opened."""

    def __init__(self, fake: FakeNbd, *, only_from: int = 0) -> None:
        self._open = trio.Event()
        self._only_from = only_from
        fake.before_answer = self._hold

    async def _hold(self, call: Call) -> None:
        if call.command == READ and call.pos >= self._only_from:
            await self._open.wait()

    def open(self) -> None:
        self._open.set()


async def _settle() -> None:
    """Until what is on its way through the loopback has arrived."""
    await trio.testing.wait_all_tasks_blocked(0.01)


# Several connections


async def test_urgent_reads_overtake_background_ones() -> None:
    fake = FakeNbd(CONTENT, WELL_BEHAVED["multi-conn"])
    async with serving(fake) as url, opened(url) as source:
        await read(source, 0, 1)
        await _settle()
        assert fake.connections == 2
        gate = Gate(fake, only_from=4096)
        async with trio.open_nursery() as nursery:
            for number in range(1, 40):
                nursery.start_soon(read, source, number * 4096, 4096)
            await _settle()
            assert await read(source, 0, 100, urgent=True) == CONTENT[:100]
            gate.open()


async def test_connections_grow_with_the_load_up_to_a_bound() -> None:
    fake = FakeNbd(CONTENT, WELL_BEHAVED["multi-conn"])
    async with serving(fake) as url, opened(url) as source:
        gate = Gate(fake)
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(read, source, number * 4096, 4096)
                await _settle()
            assert fake.connections == MAX_CONNECTIONS
            gate.open()


async def test_urgent_reads_alone_need_one_connection() -> None:
    fake = FakeNbd(CONTENT, WELL_BEHAVED["multi-conn"])
    async with serving(fake) as url, opened(url) as source:
        for _ in range(20):
            await read(source, 0, 4096, urgent=True)
        assert fake.connections == 1


async def test_one_connection_when_the_server_promises_no_more() -> None:
    fake = FakeNbd(CONTENT)
    async with serving(fake) as url, opened(url) as source:
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(read, source, number * 4096, 4096)
        assert fake.connections == 1


async def test_further_connections_that_never_come_cost_no_time(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeNbd(CONTENT, WELL_BEHAVED["multi-conn-in-name-only"])
    async with serving_on_mock_clock(fake) as url, opened(url) as source:
        for number in range(20):
            assert await read(source, number, 100) == CONTENT[number : number + 100]
        assert autojump_clock.current_time() == 0
        await trio.sleep(11)
        for number in range(20):
            assert await read(source, number, 100) == CONTENT[number : number + 100]
        assert fake.connections == 2


async def test_further_connections_read_again_only_the_blocks_that_they_compare() -> None:
    """A cluster crosses the network once; what proves the version of a connection is counted in blocks."""
    fake = FakeNbd(CONTENT, WELL_BEHAVED["multi-conn"])
    samples = Samples()
    async with serving(fake) as url, opened(url, samples) as source:
        gate = Gate(fake, only_from=8 * CLUSTER)
        for number in range(3, 8):
            await read(source, number * CLUSTER, CLUSTER, urgent=True)
        known = samples.places
        async with trio.open_nursery() as nursery:
            for number in range(8, 40):
                nursery.start_soon(read, source, number * CLUSTER, CLUSTER)
                await _settle()
            assert fake.connections == MAX_CONNECTIONS
            gate.open()
    asked = Counter((call.pos, call.size) for call in fake.calls if call.command == RequestType.READ)
    compared = {(place, BLOCK_BYTES): MAX_CONNECTIONS - 1 for place in known}
    assert len(compared) == 5
    assert asked == {(number * CLUSTER, CLUSTER): 1 for number in range(3, 40)} | compared


# Sizes of requests


async def test_requests_keep_to_the_servers_block_sizes() -> None:
    fake = FakeNbd(CONTENT, Behaviour(blocks=(512, 4096, 8192)))
    async with serving(fake) as url, opened(url) as source:
        assert await read(source, 700, 40_000) == CONTENT[700:40_700]
        assert await read(source, MiB - 1, 1) == CONTENT[-1:]
        await source.extents(1000, 1)
    assert all(call.pos % 512 == call.size % 512 == 0 for call in fake.calls)
    assert max(call.size for call in fake.calls) == 8192


async def test_an_empty_export_is_an_empty_source() -> None:
    async with serving(FakeNbd(b"")) as url, opened(url) as source:
        assert source.identity.size == 0
        await source.read(0, memoryview(bytearray(0)))
        assert await source.extents(0, 0) == []


# Death and return of the server


async def test_a_lost_connection_is_made_again_by_the_next_read() -> None:
    fake = FakeNbd(CONTENT)
    async with serving(fake) as url, opened(url) as source:
        for round_ in range(3):
            assert await read(source, round_, 100) == CONTENT[round_ : round_ + 100]
            fake.hang_up()
            await _settle()
        assert fake.connections == 3


async def test_many_reads_share_one_attempt_to_connect_and_survive_a_cancelled_one() -> None:
    fake = FakeNbd(CONTENT)
    async with serving(fake) as url, opened(url) as source:
        fake.hang_up()
        await _settle()
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as first:
                    first.start_soon(read, source, 0, 10)
                    await trio.lowlevel.checkpoint()
                    for number in range(20):
                        nursery.start_soon(read, source, number, 10)
                    await trio.lowlevel.checkpoint()
                    scope.cancel()
        assert fake.connections == 2


@pytest.mark.parametrize("size", [len(CONTENT) - 512, len(CONTENT) + 512, 0])
async def test_another_size_after_a_reconnect_is_another_version(size: int) -> None:
    fake = FakeNbd(CONTENT)
    async with serving(fake) as url, opened(url) as source:
        fake.content = bytes(size)
        fake.hang_up()
        await _settle()
        for _ in range(2):
            with pytest.raises(SourceChanged, match=rf"{url}: the export changed: size was 1048576, is now {size}"):
                await read(source, 0, 4096)
        fake.content = CONTENT
        assert await read(source, 0, 4096) == CONTENT[:4096]


async def test_a_change_seen_by_a_further_connection_ends_them_all() -> None:
    fake = FakeNbd(CONTENT, WELL_BEHAVED["multi-conn"])
    async with serving(fake) as url, opened(url) as source:
        # The first connection still serves; the second, opened on the way, tells of the change.
        await read(source, 0, 512)
        fake.content = bytes(512)
        await _settle()
        with pytest.raises(SourceChanged):
            await read(source, 0, 512)


async def test_a_killed_server_that_comes_back() -> None:
    with nbdkit("pattern", "64M", tcp=True) as server:
        async with opened(server.url) as source:
            assert await read(source, 4096, 8) == (4096).to_bytes(8, "big")
            failures: list[SourceUnreachable] = []

            async def reader(pos: int) -> None:
                for step in range(1000):
                    try:
                        got = await read(source, pos + step * 8, 8)
                    except SourceUnreachable as exc:
                        failures.append(exc)
                        return
                    assert got == (pos + step * 8).to_bytes(8, "big")

            async with trio.open_nursery() as nursery:
                for number in range(16):
                    nursery.start_soon(reader, number * MiB)
                await trio.sleep(0.02)
                server.kill()
            assert failures
            with pytest.raises(SourceUnreachable, match="cannot connect: Connection refused"):
                await read(source, 0, 8)
            server.restart()
            assert await read(source, 8, 8) == (8).to_bytes(8, "big")


# Cancellation


async def test_a_cancelled_read_is_discarded_and_the_others_go_on() -> None:
    fake = FakeNbd(CONTENT)
    gate = Gate(fake)
    async with serving(fake) as url, opened(url) as source:
        buffer = bytearray(b"\xee" * 300_000)
        done: list[bytes] = []

        async def other() -> None:
            done.append(await read(source, 0, 1000))

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as cancelled:
                    cancelled.start_soon(source.read, 100, memoryview(buffer))
                    await _settle()
                    nursery.start_soon(other)
                    await _settle()
                    scope.cancel()
            gate.open()
        assert done == [CONTENT[:1000]]
        assert buffer == b"\xee" * 300_000
        assert fake.connections == 1


async def test_a_read_cancelled_in_the_middle_of_its_payload() -> None:
    fake = FakeNbd(CONTENT)
    rest = trio.Event()
    async with serving(fake) as url, opened(url) as source:

        async def half(call: Call) -> None:
            if call.pos != 0:
                return
            (stream,) = fake.streams
            whole = fake.answer(call)
            await stream.send_all(whole[:50_000])
            await rest.wait()
            await stream.send_all(whole[50_000:])
            fake.behaviour = Behaviour(read=lambda _call: b"")

        fake.before_answer = half
        buffer = bytearray(b"\xee" * 200_000)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.read, 0, memoryview(buffer))
                await _settle()
                scope.cancel()
        arrived = len(buffer) - buffer.count(b"\xee" * 1000) * 1000
        assert 0 < arrived < 60_000, "the reply was under way"
        before = bytes(buffer)
        rest.set()
        await _settle()
        fake.behaviour = CORRECT
        assert await read(source, 7, 7) == CONTENT[7:14]
        assert buffer == before
        assert fake.connections == 1


async def test_a_deadline_on_a_silent_connection_ends_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeNbd(CONTENT, WELL_BEHAVED["silent"])
    async with serving_on_mock_clock(fake) as url, opened(url) as source:
        with trio.move_on_after(5) as scope:
            await read(source, 0, 4096)
        assert scope.cancelled_caught
        fake.behaviour = CORRECT
        assert await read(source, 0, 4096) == CONTENT[:4096]
        assert fake.connections == 2


async def test_closing_fails_what_is_in_flight() -> None:
    fake = FakeNbd(CONTENT)
    Gate(fake)
    async with serving(fake) as url, opened(url) as source:

        async def one() -> None:
            with pytest.raises(SourceUnreachable, match="connection dropped: closed"):
                await read(source, 0, 4096)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await _settle()
            await source.aclose()


async def test_closing_ends_an_attempt_to_connect(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeNbd(CONTENT)
    async with serving_on_mock_clock(fake) as url, opened(url) as source:
        fake.behaviour = Behaviour(deaf=True)
        fake.hang_up()
        await _settle()

        async def one() -> None:
            with pytest.raises(SourceUnreachable, match="closed while connecting"):
                await read(source, 0, 4096)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await _settle()
            await source.aclose()
    assert autojump_clock.current_time() < 5


async def test_the_end_of_the_nursery_ends_the_reads() -> None:
    fake = FakeNbd(CONTENT)
    Gate(fake)
    async with serving(fake) as url, trio.open_nursery() as readers, trio.open_nursery() as connections:
        source = await NbdSource.open(parse_location(url), Policy(), connections)

        async def one() -> None:
            with pytest.raises(SourceUnreachable, match="connection dropped"):
                await read(source, 0, 4096)

        readers.start_soon(one)
        await _settle()
        connections.cancel_scope.cancel()


# Where it may connect


async def test_the_address_is_judged_before_connecting() -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(Refused, match="link-local"):
            await NbdSource.open(parse_location("nbd://169.254.169.254/x"), Policy(), nursery)


async def test_nobody_listens() -> None:
    url = f"nbd://127.0.0.1:{free_port()}/disk"
    async with trio.open_nursery() as nursery:
        with pytest.raises(SourceUnreachable, match=rf"^{url}: cannot connect: Connection refused$"):
            await NbdSource.open(parse_location(url), Policy(), nursery)
        with pytest.raises(SourceUnreachable, match="there is no socket /nonexistent/socket; is the server running"):
            await NbdSource.open(parse_location("nbd+unix:///?socket=/nonexistent/socket"), Policy(), nursery)


async def test_an_unknown_export_is_named() -> None:
    async with serving(FakeNbd(CONTENT, export="disk")) as url:
        async with opened(url) as source:
            assert source.identity.size == len(CONTENT)
        async with trio.open_nursery() as nursery:
            with pytest.raises(SourceError, match="no export named 'other'") as caught:
                await NbdSource.open(parse_location(url.replace("disk", "other")), Policy(), nursery)
            assert not isinstance(caught.value, SourceUnreachable)


class OneSender:
    """A transport that is slow to send, and takes one sender at a time as trio.SSLStream does."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self._sender = trio.Lock()

    async def send(self, data: bytes) -> None:
        try:
            self._sender.acquire_nowait()
        except trio.WouldBlock:
            raise trio.BusyResourceError("another task is sending") from None
        try:
            await trio.sleep(FAREWELL_SECONDS / 2)
            self.sent.append(data)
        finally:
            self._sender.release()

    async def receive(self, replies: Replies) -> int:
        raise AssertionError("nobody listens")

    async def receive_exactly(self, size: int) -> bytes:
        raise AssertionError("nobody listens")

    def close(self) -> None:
        return


async def test_a_read_while_the_farewell_is_sent_fails_as_on_a_closed_connection(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    transport = OneSender()
    connection = Connection(parse_location("nbds://host/"), transport, Negotiated(MiB, Export(0), True, None))
    nursery.start_soon(connection.aclose)
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(SourceUnreachable):
        await connection.read(0, memoryview(bytearray(512)))
    assert transport.sent == [encode_request(RequestType.DISC, 0)]


async def test_closing_at_any_moment_leaves_no_connection_behind() -> None:
    fake = FakeNbd(CONTENT, WELL_BEHAVED["multi-conn"])
    async with serving(fake) as url:
        for turns in range(0, 60, 3):
            # `opened` waits for the nursery, so a connection that is left open would never let it end.
            with trio.fail_after(HANG_SECONDS):
                async with opened(url) as source:
                    await read(source, 0, 1)
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
        await _settle()
        assert not fake.streams
