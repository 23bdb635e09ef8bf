"""What requests of an image do while its source is away: an error at the deadline, or a wait with an end for each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from qedfs.errors import SourceError, SourceUnreachable
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.image.source_errors import EIO, OnSourceError
from qedfs.image.source_rule import set_source_errors
from qedfs.image.stalls import Stalls, StallSlots
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

DEADLINE = 30.0
HOUR = 3600.0
WAIT = OnSourceError(wait=True)
CONTENT = bytes(range(256)) * 256 * 8


@asynccontextmanager
async def away(rule: OnSourceError = WAIT, **settings: object) -> AsyncIterator[tuple[Image, FakeSource]]:
    """An image whose source has answered once and is away now."""
    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=DEADLINE) as image:
        await image.read(0, 512)
        image.stalls = Stalls(rule, **settings)  # type: ignore[arg-type]
        source.fail = SourceUnreachable("http://fake/disk.raw: connection refused")
        yield image, source
        source.fail = None
        image.stalls.set_rule(EIO)


class Asked:
    """Requests that were sent, and what became of them."""

    def __init__(self, image: Image, nursery: trio.Nursery) -> None:
        self._image = image
        self._nursery = nursery
        self.data: dict[int, bytes] = {}
        self.errors: dict[int, SourceError] = {}
        self.ended_at: dict[int, float] = {}

    def read(self, cluster: int) -> None:
        self._nursery.start_soon(self._do, cluster, False)

    def write(self, cluster: int) -> None:
        self._nursery.start_soon(self._do, cluster, True)

    async def _do(self, cluster: int, writes: bool) -> None:
        began = trio.current_time()
        pos = cluster * CLUSTER
        try:
            if writes:
                await self._image.write(pos + 512, b"g" * 512)
            else:
                self.data[cluster] = bytes(await self._image.read(pos, CLUSTER))
        except SourceError as exc:
            self.errors[cluster] = exc
        self.ended_at[cluster] = trio.current_time() - began


async def test_without_the_rule_a_request_fails_at_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with away(EIO) as (image, _), trio.open_nursery() as nursery:
        asked = Asked(image, nursery)
        asked.read(2)
        await trio.sleep(DEADLINE + 15)
        assert isinstance(asked.errors[2], SourceUnreachable)


async def test_requests_wait_for_an_hour_and_get_their_bytes(autojump_clock: trio.testing.MockClock) -> None:
    async with away() as (image, source), trio.open_nursery() as nursery:
        asked = Asked(image, nursery)
        for cluster in range(1, 5):
            asked.read(cluster)
        asked.write(5)
        await trio.sleep(HOUR)
        assert not asked.ended_at
        assert image.stalls.count == 5
        assert image.waiting_since is not None
        assert image.condition.first(Cause.FETCH_FAILED) is not None
        tries = len(source.reads)
        assert tries < HOUR / 2  # one small request each few seconds, whoever waits
        source.fail = None
        await trio.sleep(10)
        assert asked.data == {n: CONTENT[n * CLUSTER : (n + 1) * CLUSTER] for n in range(1, 5)}
        assert len(asked.ended_at) == 5
        assert image.stalls.count == 0
        assert image.condition.first(Cause.FETCH_FAILED) is None
        written = bytearray(CONTENT[5 * CLUSTER : 6 * CLUSTER])
        written[512:1024] = b"g" * 512
        assert await image.read(5 * CLUSTER, CLUSTER) == written


async def test_the_bound_ends_the_wait(autojump_clock: trio.testing.MockClock) -> None:
    async with away(OnSourceError(wait=True, bound_seconds=300)) as (image, _), trio.open_nursery() as nursery:
        asked = Asked(image, nursery)
        asked.read(2)
        await trio.sleep(299)
        assert not asked.ended_at
        await trio.sleep(2)
        assert "its backing has given no answer for 300 s" in str(asked.errors[2])


async def test_the_kernels_limit_ends_the_wait_whatever_the_rule(autojump_clock: trio.testing.MockClock) -> None:
    for rule in (WAIT, EIO):
        async with away(rule, kernel_seconds=10) as (image, _), trio.open_nursery() as nursery:
            asked = Asked(image, nursery)
            asked.read(2)
            asked.write(3)
            await trio.sleep(9)
            assert not asked.ended_at
            await trio.sleep(1.5)
            assert len(asked.errors) == 2


async def test_the_rule_eio_ends_the_waiting_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with away() as (image, _), trio.open_nursery() as nursery:
        asked = Asked(image, nursery)
        asked.read(2)
        asked.write(3)
        await trio.sleep(HOUR)
        await set_source_errors(image, EIO)
        await trio.sleep(0.1)
        assert sorted(asked.errors) == [2, 3]
        assert isinstance(asked.errors[2], SourceUnreachable)


async def test_eio_ends_those_too_that_are_being_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    async with away() as (image, source), trio.open_nursery() as nursery:
        asked = Asked(image, nursery)
        asked.read(2)
        await trio.sleep(HOUR)
        source.gate, source.fail = trio.Event(), None  # the connection is there, and no answer comes
        image.stalls.wake()
        await trio.sleep(1)
        assert not image.stalls.count
        asked.read(3)
        await set_source_errors(image, EIO)
        await trio.sleep(0.1)
        assert list(asked.errors) == [2]  # the other one has its deadline before it
        source.gate.set()
        await trio.sleep(1)
        assert 3 in asked.data


async def test_what_nobody_waits_for_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with away() as (image, _), trio.open_nursery() as nursery:
        asked = Asked(image, nursery)
        asked.read(2)
        await trio.sleep(HOUR)
        asked.read(3)
        await trio.sleep(1)
        image.give_up(since=trio.current_time() - 2)
        await trio.sleep(0.1)
        assert list(asked.errors) == [2]
        assert "nobody waits for this read any more" in str(asked.errors[2])
        nursery.cancel_scope.cancel()


async def test_a_guest_that_writes_the_whole_cluster_helps_a_reader(autojump_clock: trio.testing.MockClock) -> None:
    async with away() as (image, _), trio.open_nursery() as nursery:
        asked = Asked(image, nursery)
        asked.read(2)
        await trio.sleep(HOUR)
        await image.write(2 * CLUSTER, b"w" * CLUSTER)
        image.stalls.wake()
        await trio.sleep(0.1)
        assert asked.data == {2: b"w" * CLUSTER}


async def test_waiting_requests_do_not_make_the_stream_fail(autojump_clock: trio.testing.MockClock) -> None:
    async with away() as (image, source), trio.open_nursery() as nursery:
        stream = StreamJob(image)
        nursery.start_soon(stream.run)
        asked = Asked(image, nursery)
        asked.read(7)
        await trio.sleep(HOUR)
        # The stream asks each half minute, with a few tries each time; the reader's watch each few seconds.
        assert len(source.reads) < HOUR
        assert stream.reason.endswith("connection refused")
        source.fail = None
        await trio.sleep(60)
        assert image.complete
        assert 7 in asked.data


# Slots.


def holders(slots: StallSlots, number: int) -> list[Stalls]:
    return [Stalls(WAIT, slots=slots) for _ in range(number)]


async def test_one_image_cannot_take_all_slots(autojump_clock: trio.testing.MockClock) -> None:
    slots = StallSlots(16)
    first, second, third = holders(slots, 3)
    ended: list[str] = []

    class Deaf:
        @staticmethod
        def awaited(wake: object) -> trio.CancelScope:
            return trio.CancelScope()

    async def stall(one: Stalls, name: str) -> None:
        with pytest.raises(SourceUnreachable, match="away"):
            await one.stall(SourceUnreachable("away"), Deaf())  # type: ignore[arg-type]
        ended.append(name)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(stall, first, "first")
        await trio.testing.wait_all_tasks_blocked()
        assert first.count == 8
        assert len(ended) == 12
        for _ in range(20):
            nursery.start_soon(stall, second, "second")
        await trio.testing.wait_all_tasks_blocked()
        assert (first.count, second.count) == (4, 4)
        for _ in range(20):
            nursery.start_soon(stall, third, "third")
        await trio.testing.wait_all_tasks_blocked()
        assert sorted((first.count, second.count, third.count)) == [2, 3, 3]
        for one in (first, second, third):
            one.set_rule(EIO)
    assert len(ended) == 60
