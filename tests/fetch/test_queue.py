"""The queue of a source: what becomes of a flight and of those who wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import trio

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.fetch.flight import Consumer
from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.scheduler import RECHECK_SECONDS, Scheduler
from qedfs.image.image import Image
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER

T = TypeVar("T")
CONTENT = b"s" * (8 * CLUSTER)


class Queue:
    """A queue in a nursery of its own, which ends without those who wait for its flights."""

    def __init__(self, source: FakeSource) -> None:
        self._source = source
        self.fetch: FetchQueue
        self.scope = trio.CancelScope()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                self.fetch = FetchQueue(remote(self._source), CLUSTER, nursery)
                task_status.started()
                await trio.sleep_forever()

    async def image(self) -> Image:
        data = empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data
        return Image("disk.raw", await open_storage(MemoryStorage(data)), self.fetch)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.05])
async def test_a_queue_that_ends_leaves_its_readers_an_error(
    autojump_clock: trio.testing.MockClock, seconds: float
) -> None:
    """Whether it ends while it connects or while it asks, nobody gets zeros for bytes, and nobody waits on."""
    source = FakeSource(CONTENT)
    async with trio.open_nursery() as nursery:
        queue = Queue(source)
        await nursery.start(queue.run)
        image = await queue.image()

        async def read() -> None:
            with pytest.raises(SourceUnreachable, match="closed"):
                await image.read(0, 512)

        source.gate = trio.Event()
        began = trio.current_time()
        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            readers.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(seconds)
            queue.scope.cancel()
        assert trio.current_time() - began < 1
        assert queue.fetch.flights() == []
        assert (queue.fetch._budget.held, queue.fetch.background_bytes, queue.fetch.readers) == (0, 0, 0)


async def test_a_queue_that_has_ended_keeps_nobody_waiting(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        queue = Queue(FakeSource(CONTENT))
        await nursery.start(queue.run)
        image = await queue.image()
        await image.source_size()
        queue.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            began = trio.current_time()
            with pytest.raises((RuntimeError, QedfsError)):
                await image.read(0, 512)
            assert trio.current_time() == began
        assert queue.fetch.flights() == []
        assert (queue.fetch._budget.held, queue.fetch.readers) == (0, 0)


class Hanging(MemoryStorage):
    """The disk hangs in everything that is given to a thread, until it is `well`."""

    well = trio.Event()
    well.set()

    async def in_thread(self, function: Callable[[], T]) -> T:
        await self.well.wait()
        return await super().in_thread(function)


async def two_images(nursery: trio.Nursery, source: FakeSource) -> tuple[Image, Hanging, Image]:
    """An image on a disk that may hang, that disk, and another image on the same source."""
    fetch = FetchQueue(remote(source), CLUSTER, nursery)
    size = len(source.content)
    storage = Hanging(empty(cluster_size=CLUSTER, image_size=size, backing=b"http://fake/disk.raw").data)
    other = MemoryStorage(storage.bytes)
    images = [Image(name, await open_storage(disk), fetch) for name, disk in (("a.raw", storage), ("b.raw", other))]
    for image in images:
        await image.source_size()
        await image.overlay.count_missing()
    return images[0], storage, images[1]


async def test_a_disk_that_hangs_costs_its_own_image_only(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"s" * (400 * CLUSTER))
    async with trio.open_nursery() as nursery:
        stuck, storage, well = await two_images(nursery, source)
        stuck_job, well_job = StreamJob(stuck), StreamJob(well)
        storage.well = trio.Event()
        nursery.start_soon(stuck_job.run)
        nursery.start_soon(well_job.run)
        await trio.sleep(60)
        assert (stuck_job.state, well_job.state) == (State.RUNNING, State.COMPLETE)
        assert await well.read(0, len(source.content)) == source.content
        storage.well.set()
        await trio.sleep(60)
        assert stuck_job.state is State.COMPLETE
        assert await stuck.read(0, len(source.content)) == source.content
        nursery.cancel_scope.cancel()


async def test_what_waits_for_a_disk_that_hangs_is_bounded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.fetch.budget.MOST_HELD_BYTES", 64 * CLUSTER)
    source = FakeSource(b"s" * (400 * CLUSTER))
    async with trio.open_nursery() as nursery:
        stuck, storage, well = await two_images(nursery, source)
        fetch = stuck.fetch
        assert fetch is not None
        storage.well = trio.Event()
        nursery.start_soon(StreamJob(stuck).run)
        for cluster in range(0, 400, 2):
            assert await stuck.read(cluster * CLUSTER, 512) == b"s" * 512
            assert fetch._budget.held <= 64 * CLUSTER
        job = StreamJob(well)
        nursery.start_soon(job.run)
        await trio.sleep(60)
        assert job.state is State.COMPLETE
        assert 0 < fetch._budget.held < 64 * CLUSTER
        nursery.cancel_scope.cancel()


async def test_beside_a_stream_that_is_ahead_of_the_disk_no_byte_is_fetched_twice(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream leaves room for what readers ask for, which is kept as well."""
    monkeypatch.setattr("qedfs.fetch.budget.MOST_HELD_BYTES", 64 * CLUSTER)
    source = FakeSource(b"s" * (400 * CLUSTER))
    async with trio.open_nursery() as nursery:
        stuck, storage, _ = await two_images(nursery, source)
        storage.well = trio.Event()
        job = StreamJob(stuck)
        nursery.start_soon(job.run)
        await trio.sleep(10)
        for cluster in (399, 200, 300):
            assert await stuck.read(cluster * CLUSTER, 512) == b"s" * 512
        storage.well.set()
        await trio.sleep(60)
        assert job.state is State.COMPLETE
        assert source.bytes_read == len(source.content)
        nursery.cancel_scope.cancel()


async def test_who_waits_for_a_disk_that_hangs_looks_seldom(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeSource(b"s" * (2000 * CLUSTER), round_trip=0.001)
    looks: list[float] = []
    must_wait = Scheduler._must_wait

    def noted(self: Scheduler, consumer: Consumer, size: int, allowed: int) -> bool:
        looks.append(trio.current_time())
        return must_wait(self, consumer, size, allowed)

    monkeypatch.setattr(Scheduler, "_must_wait", noted)
    async with trio.open_nursery() as nursery:
        stuck, storage, _ = await two_images(nursery, source)
        storage.well = trio.Event()
        job = StreamJob(stuck)
        nursery.start_soon(job.run)
        await trio.sleep(10)
        looks.clear()
        await trio.sleep(10)
        assert 0 < len(looks) <= 20 / RECHECK_SECONDS
        storage.well.set()
        await trio.sleep(10)
        assert job.state is State.COMPLETE
        nursery.cancel_scope.cancel()


async def test_who_comes_late_to_a_flight_takes_it_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Its bytes are here, and wait for a disk that hangs: they do not cross the wire again."""
    source = FakeSource(CONTENT)
    async with trio.open_nursery() as nursery:
        stuck, storage, well = await two_images(nursery, source)
        storage.well = trio.Event()
        await stuck.read(0, len(CONTENT))
        await trio.sleep(1)
        began = trio.current_time()
        assert await well.read(0, len(CONTENT)) == CONTENT
        await trio.testing.wait_all_tasks_blocked()
        assert well.overlay.missing == 0
        assert trio.current_time() == began
        assert source.bytes_read == len(CONTENT)
        nursery.cancel_scope.cancel()


async def test_a_fault_of_a_taker_costs_nobody_else(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = FakeSource(CONTENT)
    async with trio.open_nursery() as nursery:
        faulty, _, well = await two_images(nursery, source)

        async def take(pos: int, buffer: bytearray, size: int, *, asked: bool) -> None:
            raise KeyError("a fault")

        monkeypatch.setattr(faulty.consumer, "take", take)
        well.streaming = True
        assert faulty.fetch is not None
        faulty.fetch.consumers.append(well.consumer)
        await faulty.read(0, len(CONTENT))
        await trio.testing.wait_all_tasks_blocked()
        assert faulty.failures == 1
        assert "a fault" in caplog.text
        assert well.overlay.missing == 0
        assert faulty.fetch._budget.held == 0
        nursery.cancel_scope.cancel()


async def test_a_request_counts_against_each_image_when_it_is_sent_and_once_against_the_limit_of_the_mount(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """At its arrival, each sibling would have sent a request of its own."""
    source = FakeSource(CONTENT)
    async with trio.open_nursery() as nursery:
        queue = Queue(source)
        await nursery.start(queue.run)
        one, two = [await queue.image() for _ in range(2)]
        for image in (one, two):
            await image.source_size()
            image.streaming = True  # as a stream does
            queue.fetch.consumers.append(image.consumer)
            image.limiter.limit = len(CONTENT)
        total = queue.fetch._total.limiter
        total.limit = len(CONTENT)
        source.gate = trio.Event()
        queue.fetch.start(0, 2, consumer=one.consumer)
        assert (one.limiter.granted, two.limiter.granted, total.granted) == (2 * CLUSTER,) * 3
        queue.fetch.start(0, 2, consumer=two.consumer)  # what is in flight already
        assert (one.limiter.granted, two.limiter.granted, total.granted) == (2 * CLUSTER,) * 3
        source.gate.set()
        await queue.fetch.landed(two.consumer)
        assert (one.limiter.granted, two.limiter.granted, total.granted) == (2 * CLUSTER,) * 3
        nursery.cancel_scope.cancel()
