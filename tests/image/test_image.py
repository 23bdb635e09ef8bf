"""A served image: what readers and writers see, what crosses the wire, what is kept, what a failure costs."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.errors import NoSpace, SourceChanged, SourceError, SourceUnreachable
from qedfs.image.image import Image
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

CONTENT = random.Random(7).randbytes(40 * CLUSTER)


async def read(image: Image, pos: int, size: int) -> bytes:
    return bytes(await image.read(pos, size))


async def test_a_read_answers_the_source_and_keeps_whole_clusters(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        assert await read(image, 3 * CLUSTER + 100, 1000) == CONTENT[3 * CLUSTER + 100 : 3 * CLUSTER + 1100]
        assert source.reads == [(3 * CLUSTER, CLUSTER, True)]
        assert await read(image, 3 * CLUSTER, CLUSTER) == CONTENT[3 * CLUSTER : 4 * CLUSTER]
        assert len(source.reads) == 1


async def test_many_readers_of_one_cluster_cross_the_wire_once(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(_check, image, 5 * CLUSTER + number * 512, 512)
        assert source.reads == [(5 * CLUSTER, CLUSTER, True)]


async def _check(image: Image, pos: int, size: int) -> None:
    assert await read(image, pos, size) == CONTENT[pos : pos + size]


async def test_a_killed_reader_does_not_end_the_flight_that_others_wait_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await read(image, 0, 512)

        nursery.start_soon(first)
        await trio.sleep(source.round_trip)
        nursery.start_soon(_check, image, 512, 512)
        scope.cancel()
    assert len(source.reads) == 1


@pytest.mark.parametrize("source_size", [0, 1, CLUSTER - 1, CLUSTER, CLUSTER + 1, 3 * CLUSTER + 512, 9 * CLUSTER])
async def test_behind_the_end_of_the_source_there_are_zeros(
    source_size: int, autojump_clock: trio.testing.MockClock
) -> None:
    source = FakeSource(CONTENT[:source_size])
    size = 6 * CLUSTER + 1024
    expected = (CONTENT[:source_size] + bytes(size))[:size]
    async with served(source, image_size=size) as image:
        assert await read(image, 0, size + 100) == expected
        assert await read(image, size, 100) == b""
        await image.write(
            2 * CLUSTER + 10,
            b"guest",
        )
        expected = expected[: 2 * CLUSTER + 10] + b"guest" + expected[2 * CLUSTER + 15 :]
        assert await read(image, 0, size) == expected


async def test_a_write_in_part_fetches_the_rest_of_its_cluster(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        await image.write(CLUSTER + 5, b"x" * 10)
        await image.write(4 * CLUSTER, b"y" * CLUSTER)
        assert [pos for pos, _, _ in source.reads] == [CLUSTER]
        merged = CONTENT[CLUSTER : CLUSTER + 5] + b"x" * 10 + CONTENT[CLUSTER + 15 : 2 * CLUSTER]
        assert await read(image, CLUSTER, CLUSTER) == merged


async def test_a_guest_write_between_fetch_and_adoption_wins(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.gate = trio.Event()
    async with served(source) as image, trio.open_nursery() as nursery:
        nursery.start_soon(read, image, 2 * CLUSTER, 512)
        await trio.testing.wait_all_tasks_blocked()
        await image.write(2 * CLUSTER, b"g" * CLUSTER)
        source.gate.set()
        await trio.sleep(1)
        assert await read(image, 2 * CLUSTER, CLUSTER) == b"g" * CLUSTER


async def test_a_failed_fetch_keeps_nothing_and_the_next_one_works(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=5) as image:
        source.fail = SourceUnreachable("away")
        began = trio.current_time()
        with pytest.raises(SourceUnreachable, match="away"):
            await read(image, 0, 512)
        assert 4 < trio.current_time() - began < 6
        assert image.populated == 0
        source.fail = None
        assert await read(image, 0, CLUSTER) == CONTENT[:CLUSTER]


async def test_a_permanent_failure_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.fail = SourceError("404")
    async with served(source) as image:
        began = trio.current_time()
        with pytest.raises(SourceError, match="404"):
            await read(image, 0, 512)
        assert trio.current_time() - began < 1


async def test_without_copy_on_read_nothing_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, copy_on_read=False) as image:
        for _ in range(2):
            assert await read(image, 0, 3 * CLUSTER) == CONTENT[: 3 * CLUSTER]
        assert image.populated == 0
        assert source.bytes_read == 6 * CLUSTER


async def test_another_version_of_the_source_is_never_mixed_in(autojump_clock: trio.testing.MockClock) -> None:
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)
    async with served(FakeSource(CONTENT), storage=storage) as image:
        await read(image, 0, 512)
    again = MemoryStorage(storage.bytes)
    changed = FakeSource(bytes(len(CONTENT)), etag='"v2"')
    async with served(changed, storage=again) as image:
        assert await read(image, 0, CLUSTER) == CONTENT[:CLUSTER]
        with pytest.raises(SourceChanged, match="v2"):
            await read(image, CLUSTER, 512)
        assert image.changed is not None
        assert changed.bytes_read == 0


async def test_a_sequential_reader_is_served_ahead(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        began = trio.current_time()
        for pos in range(0, len(CONTENT), 2 * CLUSTER):
            assert await read(image, pos, 2 * CLUSTER) == CONTENT[pos : pos + 2 * CLUSTER]
            await trio.sleep(0.001)
        assert source.bytes_read == len(CONTENT)
        assert trio.current_time() - began < 10 * source.round_trip


# The stream.


def state_of(job: StreamJob) -> State:
    """A call: mypy takes an attribute that it saw compared for unchanged, also over an `await`."""
    return job.state


async def streamed(image: Image, **options: object) -> StreamJob:
    job = StreamJob(image, **options)  # type: ignore[arg-type]
    await job.run()
    return job


async def test_the_stream_completes_and_detaches(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)
    async with served(source, storage=storage) as image:
        job = await streamed(image)
        assert (job.state, job.progress) == (State.COMPLETE, len(CONTENT))
        assert source.bytes_read == len(CONTENT)
    alone = await open_storage(MemoryStorage(storage.bytes))
    assert alone.backing is None
    image = Image("disk.raw", alone, None)
    assert await read(image, 0, len(CONTENT)) == CONTENT


async def test_a_stream_that_was_cut_fetches_nothing_twice(autojump_clock: trio.testing.MockClock) -> None:
    content = random.Random(3).randbytes(400 * CLUSTER)
    first, second = FakeSource(content), FakeSource(content)
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(content), backing=b"http://fake/disk.raw").data)
    async with served(first, storage=storage) as image:
        with trio.move_on_after(0.05):
            await streamed(image)
        await image.fetch.landed(image.consumer)  # type: ignore[union-attr]
    assert 0 < first.bytes_read < len(content)
    async with served(second, storage=MemoryStorage(storage.bytes)) as image:
        await streamed(image)
        assert await read(image, 0, len(content)) == content
    assert first.bytes_read + second.bytes_read == len(content)


async def test_holes_of_the_source_do_not_cross_the_wire(autojump_clock: trio.testing.MockClock) -> None:
    content = bytearray(200 * CLUSTER)
    content[0 : 3 * CLUSTER] = b"a" * (3 * CLUSTER)
    content[50 * CLUSTER + 100 : 51 * CLUSTER] = b"b" * (CLUSTER - 100)
    source = FakeSource(bytes(content))
    source.holes = [(3 * CLUSTER, 47 * CLUSTER + 100), (51 * CLUSTER, 149 * CLUSTER)]
    async with served(source, image_size=300 * CLUSTER) as image:
        await streamed(image)
        assert source.bytes_read == 4 * CLUSTER
        assert await read(image, 0, 300 * CLUSTER) == bytes(content) + bytes(100 * CLUSTER)


async def test_at_least_sixteen_requests_are_in_flight(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(random.Random(5).randbytes(300 * CLUSTER), round_trip=0.1)
    async with served(source) as image:
        await streamed(image)
    assert source.most_in_flight >= 16


async def test_while_a_reader_waits_one_background_request_leaves(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(random.Random(5).randbytes(3000 * CLUSTER), round_trip=0.05)
    async with served(source) as image, trio.open_nursery() as nursery:
        nursery.start_soon(streamed, image)
        await trio.sleep(0.2)
        for number in range(20):
            before = len(source.reads)
            pos = (2999 - number * 7) * CLUSTER
            await read(image, pos, 4096)
            if number > 2:  # by then what was in flight before the first reader has landed
                background = [r for r in source.reads[before:] if not r[2]]
                assert len(background) <= 3
        nursery.cancel_scope.cancel()


async def test_the_stream_waits_for_a_source_that_is_away(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=2) as image, trio.open_nursery() as nursery:
        job = StreamJob(image)
        source.fail = SourceUnreachable("away")
        nursery.start_soon(job.run)
        await trio.sleep(20)
        assert state_of(job) is State.WAITING
        assert "away" in job.reason
        source.fail = None
        await trio.sleep(60)
        assert state_of(job) is State.COMPLETE


async def test_the_stream_pauses_on_a_full_disk_and_resumes_by_itself(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)
    async with served(source, storage=storage) as image, trio.open_nursery() as nursery:
        job = StreamJob(image)
        await read(image, 0, 512)
        storage.fail("write", NoSpace("full"), forever=True)
        storage.fail("resize", NoSpace("full"), forever=True)
        nursery.start_soon(job.run)
        await trio.sleep(30)
        assert state_of(job) is State.PAUSED
        assert "full" in job.reason
        assert source.bytes_read < 4 * len(CONTENT)
        storage.mend()
        await trio.sleep(30)
        assert state_of(job) is State.COMPLETE
        assert await read(image, 0, len(CONTENT)) == CONTENT


async def test_steps_complete_an_image_without_the_job(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        job = StreamJob(image, enabled=False)
        pos, populated = 0, 0
        while True:
            _, size, following = await job.step(pos)
            populated += size
            if following is None:
                break
            pos = following
        assert populated == len(CONTENT)
        assert image.complete
        await job.run()
        assert state_of(job) is State.COMPLETE


async def test_two_overlays_on_one_source_share_every_fetch(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(random.Random(5).randbytes(200 * CLUSTER))
    async with served(source) as first:
        fetch = first.fetch
        others = []
        for number in range(4):
            data = empty(cluster_size=CLUSTER, image_size=len(source.content), backing=b"http://fake/disk.raw").data
            overlay = await open_storage(MemoryStorage(data))
            others.append(Image(f"{number}.raw", overlay, fetch))
            await overlay.count_missing()
        async with trio.open_nursery() as nursery:
            for image in (first, *others):
                nursery.start_soon(streamed, image)
        assert source.bytes_read == len(source.content)
        for image in (first, *others):
            assert await read(image, 0, len(source.content)) == source.content
            assert image.complete


async def test_an_error_stays_to_be_seen_while_the_stream_tries_again(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, deadline_seconds=2) as image, trio.open_nursery() as nursery:
        source.fail = SourceUnreachable("away")
        job = StreamJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(3)
        for _ in range(40):
            assert image.condition.worst is not None
            await trio.sleep(0.3)
        source.fail = None
        await trio.sleep(60)
        assert (job.state, image.condition.worst) == (State.COMPLETE, None)


async def test_a_fault_of_ours_ends_the_stream_and_says_so(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(FakeSource(CONTENT)) as image, trio.open_nursery() as nursery:

        def broken() -> str:
            raise KeyError("a fault")

        job = StreamJob(image, hold_off=broken)
        nursery.start_soon(job.run)
        await trio.sleep(1)
        assert state_of(job) is State.FAILED
        assert "internal error" in job.reason
        nursery.cancel_scope.cancel()


async def test_a_complete_image_asks_nothing_of_the_source_any_more(autojump_clock: trio.testing.MockClock) -> None:
    # 4 KiB clusters with one-cluster tables: a table spans 2 MiB, so whole tables lie in the hole.
    content = b"a" * CLUSTER + bytes(8 << 20)
    source = FakeSource(content)
    source.holes = [(CLUSTER, 8 << 20)]
    async with served(source, cluster_size=4096) as image:
        await streamed(image)
        assert image.overlay.missing  # in the tables that were passed over
        source.fail = SourceError("gone")
        asked = len(source.reads)
        assert await read(image, 0, len(content)) == content
        assert len(source.reads) == asked


async def test_a_link_slower_than_the_deadline_still_completes(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=40)
    async with served(source, deadline_seconds=30) as image:
        image.fetch.remote.deadline_seconds = 30  # type: ignore[union-attr]
        source.round_trip = 0.02
        await image.source_size()
        source.round_trip = 40
        job = await streamed(image)
        assert state_of(job) is State.COMPLETE


async def test_a_validator_that_appears_later_joins_the_pin(autojump_clock: trio.testing.MockClock) -> None:
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)
    async with served(FakeSource(CONTENT, etag=None), storage=storage) as image:
        await read(image, 0, 512)
    second = MemoryStorage(storage.bytes)
    async with served(FakeSource(CONTENT, etag='"v1"'), storage=second) as image:
        await read(image, CLUSTER, 512)
    async with served(FakeSource(CONTENT, etag='"v2"'), storage=MemoryStorage(second.bytes)) as image:
        with pytest.raises(SourceChanged):
            await read(image, 2 * CLUSTER, 512)
