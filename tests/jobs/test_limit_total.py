"""The limit of a mount over the streams of several sources: kept, shared fairly, and changed while they wait for it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
import trio.testing

from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.total_limit import TotalLimit
from qedfs.image.image import Image
from qedfs.jobs.prefetch import replay
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import tended

# Thousands of rounds through code that other tests cover: a tracer would double their time.
pytestmark = [pytest.mark.sweep, pytest.mark.no_cover]

CLUSTER = 4 << 10
TOTAL = 64 * CLUSTER  # a second
WINDOW_SECONDS = 20.0
CONTENT = random.Random(8).randbytes(TOTAL) * 80


class Compressed(FakeSource):
    """Transfers a quarter of what it reads, as a qcow2 image may."""

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> int:  # type: ignore[override]
        await super().read(pos, buffer, urgent=urgent)
        return len(buffer) // 4


@contextlib.asynccontextmanager
async def streams(
    total: TotalLimit, sources: Sequence[FakeSource], limits: Sequence[int] = ()
) -> AsyncIterator[list[StreamJob]]:
    """The running streams of one image per element of `sources`; those with the same source share its queue."""
    async with trio.open_nursery() as nursery:
        queues = {
            source: FetchQueue(remote(source), CLUSTER, nursery, total=total) for source in dict.fromkeys(sources)
        }
        jobs = []
        for number, source in enumerate(sources):
            overlay = empty(cluster_size=CLUSTER, image_size=len(source.content), backing=b"http://fake/disk.raw")
            image = Image(f"{number}.raw", await open_storage(MemoryStorage(overlay.data)), queues[source])
            nursery.start_soon(tended, image)
            await image.overlay.count_missing()
            jobs.append(StreamJob(image, limit=limits[number] if limits else 0))
        for job in jobs:
            nursery.start_soon(job.run)
        yield jobs
        nursery.cancel_scope.cancel()


async def rates(jobs: Sequence[StreamJob], seconds: float = WINDOW_SECONDS) -> list[float]:
    before = [job.image.counters.kept_stream for job in jobs]
    await trio.sleep(seconds)
    return [(job.image.counters.kept_stream - kept) / seconds for job, kept in zip(jobs, before, strict=True)]


def about(rate: float) -> object:
    return pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("count", [1, 4, 8])
async def test_it_is_shared_equally_between_sources(autojump_clock: trio.testing.MockClock, count: int) -> None:
    total = TotalLimit(TOTAL)
    async with streams(total, [FakeSource(CONTENT) for _ in range(count)]) as jobs:
        await trio.sleep(1)
        for _ in range(2):
            before = total.limiter.granted
            found = await rates(jobs)
            assert total.limiter.granted - before == about(TOTAL * WINDOW_SECONDS)
            # A piece is a quarter of a second of the whole limit.
            assert all(abs(rate - TOTAL / count) * WINDOW_SECONDS <= 0.05 * TOTAL * WINDOW_SECONDS for rate in found)
            assert min(found) > 0.8 * TOTAL / count


async def test_images_of_one_source_all_get_what_is_fetched_once(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with streams(TotalLimit(TOTAL), 4 * [source]) as jobs:
        await trio.sleep(1)
        assert await rates(jobs) == 4 * [about(TOTAL)]
        await trio.sleep(70)
        assert all(job.state is State.COMPLETE for job in jobs)
        assert source.bytes_read == len(CONTENT)


async def test_many_images_of_one_source_beside_one_of_another(autojump_clock: trio.testing.MockClock) -> None:
    one, other = FakeSource(CONTENT), FakeSource(CONTENT)
    async with streams(TotalLimit(TOTAL), [*6 * [one], other]) as jobs:
        await trio.sleep(1)
        assert await rates(jobs, 40) == 7 * [about(TOTAL / 2)]


async def test_what_an_image_may_not_use_goes_to_the_others(autojump_clock: trio.testing.MockClock) -> None:
    """Max-min: one image has a limit of its own below its share."""
    sources = [FakeSource(CONTENT) for _ in range(3)]
    async with streams(TotalLimit(TOTAL), sources, [TOTAL // 8, 0, 0]) as jobs:
        await trio.sleep(1)
        slow, *others = await rates(jobs, 60)
        assert slow == about(TOTAL / 8)
        assert others == 2 * [about(TOTAL * 7 / 16)]


async def test_compressed_bytes_count_as_they_are(autojump_clock: trio.testing.MockClock) -> None:
    total = TotalLimit(TOTAL)
    async with streams(total, [Compressed(CONTENT)]) as jobs:
        await trio.sleep(1)
        before = total.limiter.granted
        assert await rates(jobs, 10) == [about(4 * TOTAL)]
        assert total.limiter.granted - before == about(10 * TOTAL)


async def test_what_is_told_to_have_been_fetched_has_arrived_and_never_falls(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A metric that falls looks like a restart of the program."""
    total = TotalLimit(TOTAL)
    source = Compressed(CONTENT, round_trip=0.2)
    async with streams(total, [source]) as jobs:
        told = 0
        for _ in range(100):
            await trio.sleep(0.03)
            assert told <= total.fetched <= source.bytes_read // 4
            told = total.fetched
        assert jobs[0].image.counters.kept_stream <= 4 * told


async def test_a_command_ends_a_wait_for_it(autojump_clock: trio.testing.MockClock) -> None:
    """A cluster takes an hour."""
    total = TotalLimit(1)
    async with streams(total, [FakeSource(CONTENT) for _ in range(3)]) as jobs:
        await trio.sleep(100)
        await jobs[0].pause()
        jobs[1].cancel()
        await trio.sleep(1)
        assert [job.state for job in jobs] == [State.PAUSED, State.OFF, State.RUNNING]
        total.limiter.limit = TOTAL
        await trio.sleep(1)
        assert await rates(jobs) == [0, 0, about(TOTAL)]
        total.limiter.limit = 0
        await trio.sleep(10)
        assert jobs[2].state is State.COMPLETE


async def test_readers_do_not_wait_for_it(autojump_clock: trio.testing.MockClock) -> None:
    total = TotalLimit(1)
    async with streams(total, [FakeSource(CONTENT)]) as jobs:
        await trio.sleep(10)
        began, before = trio.current_time(), total.limiter.granted
        for pos in range(0, 40 * CLUSTER, 2 * CLUSTER):
            await jobs[0].image.read(pos, CLUSTER)
        assert trio.current_time() - began < 2
        assert total.limiter.granted == before


async def test_a_profile_counts(autojump_clock: trio.testing.MockClock) -> None:
    total = TotalLimit(TOTAL)
    async with streams(total, [FakeSource(CONTENT)]) as jobs, trio.open_nursery() as nursery:
        await trio.sleep(1)
        before = total.limiter.granted
        nursery.start_soon(replay, jobs[0].image, [(len(CONTENT) // 2, 30 * TOTAL)])
        await trio.sleep(20)
        assert jobs[0].image.replaying
        assert total.limiter.granted - before == about(20 * TOTAL)
        nursery.cancel_scope.cancel()


async def test_a_rest_leaves_no_credit(autojump_clock: trio.testing.MockClock) -> None:
    total = TotalLimit(TOTAL)
    async with streams(total, [FakeSource(CONTENT) for _ in range(3)]) as jobs:
        for job in jobs:
            await job.pause()
        await trio.sleep(3600)
        before = total.limiter.granted
        for job in jobs:
            await job.resume()
        await trio.sleep(1)
        assert total.limiter.granted - before <= 2 * TOTAL
