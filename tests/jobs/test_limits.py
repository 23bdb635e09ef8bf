"""The limit of an image: kept, whoever fetches what it keeps; spread out evenly; changed while it streams."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
import trio.testing

from qedfs.fetch.queue import FetchQueue
from qedfs.image.image import Image
from qedfs.jobs.prefetch import replay
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served, tended

# Thousands of rounds through code that other tests cover: a tracer would double their time.
pytestmark = [pytest.mark.sweep, pytest.mark.no_cover]

CONTENT = random.Random(5).randbytes(CLUSTER) * 320


async def test_a_limit_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=0.001)
    async with served(source) as image:
        began = trio.current_time()
        await StreamJob(image, limit=2 << 20).run()
        seconds = trio.current_time() - began
        assert image.complete
    assert 9 < seconds < 11


async def test_a_low_limit_is_spread_out(autojump_clock: trio.testing.MockClock) -> None:
    """What a fast link would bring at once is half a minute of it: the rate and the end would be anybody's guess."""
    source = FakeSource(CONTENT, round_trip=0.001)
    async with served(source) as image, trio.open_nursery() as nursery:
        await image.source_size()
        assert image.fetch is not None
        image.fetch.window._best = 1e9
        assert image.fetch.background_request_bytes() == 32 * CLUSTER
        nursery.start_soon(StreamJob(image, limit=CLUSTER).run)
        await trio.sleep(5)
        for _ in range(50):
            before = source.bytes_read
            await trio.sleep(5)
            assert 4 * CLUSTER <= source.bytes_read - before <= 6 * CLUSTER
        nursery.cancel_scope.cancel()


async def test_a_new_limit_and_a_pause_take_effect_at_once(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=0.001)
    async with served(source) as image, trio.open_nursery() as nursery:
        job = StreamJob(image, limit=100)
        nursery.start_soon(job.run)
        await trio.sleep(10)
        await job.pause()
        await trio.sleep(1)
        assert job.state is State.PAUSED
        asked = source.bytes_read
        await trio.sleep(10000)
        assert source.bytes_read == asked
        job.set_limit(100 << 20)
        await job.resume()
        await trio.sleep(5)
        assert image.complete


# Several images of one source.

SMALL = 4 << 10  # clusters, so that half a minute has few bytes
LIMIT = 16 * SMALL  # a second
WINDOW_SECONDS = 20.0


@contextlib.asynccontextmanager
async def siblings(
    source: FakeSource, *limits: int, lacking: Sequence[range] = (), stream: bool = True
) -> AsyncIterator[list[tuple[Image, StreamJob]]]:
    """Images on one queue, each with its limit, whose streams run. `lacking`: the clusters that an image lacks."""
    async with trio.open_nursery() as nursery:
        fetch = FetchQueue(remote(source), SMALL, nursery)
        images = []
        for number, limit in enumerate(limits):
            overlay = empty(cluster_size=SMALL, image_size=len(source.content), backing=b"http://fake/disk.raw")
            image = Image(f"{number}.raw", await open_storage(MemoryStorage(overlay.data)), fetch)
            nursery.start_soon(tended, image)
            await image.overlay.count_missing()
            if lacking:
                for cluster in set(range(len(source.content) // SMALL)) - set(lacking[number]):
                    await image.write(cluster * SMALL, b"w" * SMALL)
            images.append((image, StreamJob(image, limit=limit)))
        for _, job in images if stream else ():
            nursery.start_soon(job.run)
        yield images
        nursery.cancel_scope.cancel()


async def rates(images: Sequence[tuple[Image, StreamJob]], seconds: float = WINDOW_SECONDS) -> list[float]:
    """What each image keeps per second from now on, without what its own readers ask for."""
    before = [image.counters.kept_stream for image, _ in images]
    await trio.sleep(seconds)
    return [(image.counters.kept_stream - kept) / seconds for (image, _), kept in zip(images, before, strict=True)]


def some(seconds: float) -> bytes:
    """As many clusters as the limit lets through in this time."""
    return random.Random(6).randbytes(int(LIMIT * seconds))


@pytest.mark.parametrize("count", [2, 8, pytest.param(16, marks=pytest.mark.slow)])
async def test_each_sibling_keeps_what_its_limit_allows(autojump_clock: trio.testing.MockClock, count: int) -> None:
    """And every cluster crosses the wire once, as all of them keep what one of them fetches."""
    source = FakeSource(some(100))
    async with siblings(source, *count * [LIMIT]) as images:
        for _ in range(4):
            for rate in await rates(images):
                assert rate == pytest.approx(LIMIT, rel=0.05)
            assert source.bytes_read <= images[0][0].counters.kept + LIMIT
        await trio.sleep(25)
        assert all(image.complete for image, _ in images)
        assert source.bytes_read == len(source.content)


async def test_a_far_source_is_read_once_as_well(autojump_clock: trio.testing.MockClock) -> None:
    """The round trip is longer than a piece takes, so siblings are due while the flight is on its way."""
    source = FakeSource(some(60), round_trip=2)
    async with siblings(source, *4 * [LIMIT]) as images:
        await trio.sleep(10)
        for rate in await rates(images):
            assert rate == pytest.approx(LIMIT, rel=0.05)
        await trio.sleep(50)
        assert all(image.complete for image, _ in images)
        assert source.bytes_read == len(source.content)


async def test_siblings_that_lack_different_clusters(autojump_clock: trio.testing.MockClock) -> None:
    """The last one keeps fetching what all lack, and the others keep that instead of sending requests of their own."""
    source = FakeSource(some(90))
    clusters = len(source.content) // SMALL
    lacking = [range(start, clusters) for start in (0, clusters // 6, clusters // 3)]
    async with siblings(source, *3 * [LIMIT], lacking=lacking) as images:
        await trio.sleep(1)
        for _ in range(2):
            for rate in await rates(images):
                assert rate == pytest.approx(LIMIT, rel=0.05)
        await trio.sleep(100)
        assert all(image.complete for image, _ in images)
        assert source.bytes_read <= len(source.content) + 4 * LIMIT // 4  # the pieces of the first moment


async def test_a_slow_sibling_slows_nobody(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(some(400))
    limits = [LIMIT // 4, 4 * LIMIT, LIMIT]
    async with siblings(source, *limits) as images:
        await trio.sleep(1)
        for _ in range(3):
            for limit, rate in zip(limits, await rates(images), strict=True):
                assert rate == pytest.approx(limit, rel=0.05)
        # While the fast one fetches more than their limits allow, the others send nothing.
        assert source.bytes_read <= images[1][0].counters.kept + 4 * LIMIT


async def test_beside_a_sibling_without_a_limit(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(some(400), round_trip=1.0)
    async with siblings(source, 0, LIMIT) as images:
        assert (await rates(images))[1] <= 1.05 * LIMIT
        assert images[0][0].complete
        for _ in range(2):
            assert (await rates(images))[1] == pytest.approx(LIMIT, rel=0.05)


async def test_what_a_sibling_reads_counts_as_well(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(some(400))
    async with siblings(source, LIMIT, LIMIT) as images, trio.open_nursery() as nursery:
        reading, other = images[0][0], images[1][0]

        async def read_all() -> None:
            for pos in range(0, reading.size, 8 * SMALL):
                await reading.read(pos, 8 * SMALL)

        nursery.start_soon(read_all)
        for _ in range(2):
            assert (await rates(images))[1] == pytest.approx(LIMIT, rel=0.05)
        # What its own reader asks for is not limited.
        assert reading.counters.kept_asked > 20 * LIMIT
        assert reading.counters.kept_stream <= reading.limiter.granted
        assert other.counters.kept_asked == 0
        nursery.cancel_scope.cancel()


async def test_a_paused_sibling_keeps_nothing(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(some(100))
    async with siblings(source, *3 * [LIMIT]) as images:
        await trio.sleep(5)
        await images[0][1].pause()
        await trio.sleep(1)
        for rate, expected in zip(await rates(images), [0, LIMIT, LIMIT], strict=True):
            assert rate == pytest.approx(expected, rel=0.05)
        # After the pause it has no more than its limit.
        await images[0][1].resume()
        for rate in await rates(images):
            assert rate == pytest.approx(LIMIT, rel=0.05)


async def test_a_rest_leaves_no_credit(autojump_clock: trio.testing.MockClock) -> None:
    """As between two nights, with --stream-between."""
    source = FakeSource(some(100))
    resting = True
    async with siblings(source, *3 * [LIMIT]) as images:
        for _, job in images:
            job.hold_off = lambda: "the night has not come" if resting else ""
        await trio.sleep(3600)
        resting = False
        for rate in await rates(images):
            assert rate <= 1.05 * LIMIT
        resting = True


async def test_a_new_limit_of_one_sibling(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(some(400))
    async with siblings(source, *3 * [SMALL // 64]) as images:
        await trio.sleep(10)  # all of them wait for a minute
        images[0][1].set_limit(LIMIT)
        await trio.sleep(1)
        assert (await rates(images))[0] == pytest.approx(LIMIT, rel=0.05)
        for _, job in images:
            job.set_limit(2 * LIMIT)
        await trio.sleep(1)
        for rate in await rates(images):
            assert rate == pytest.approx(2 * LIMIT, rel=0.05)
        for _, job in images:
            job.set_limit(0)
        await trio.sleep(5)
        assert all(image.complete for image, _ in images)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_limit_below_a_cluster(autojump_clock: trio.testing.MockClock, count: int) -> None:
    """A cluster takes eight seconds."""
    source = FakeSource(random.Random(7).randbytes(200 * SMALL))
    async with siblings(source, *count * [SMALL // 8]) as images:
        await trio.sleep(30)
        for rate in await rates(images, 800):
            assert rate == pytest.approx(SMALL // 8, rel=0.05)
        assert source.bytes_read <= images[0][0].counters.kept + 2 * SMALL


async def test_a_profile_counts_and_comes_first(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(some(100))
    async with siblings(source, 0, LIMIT) as images:
        await images[0][1].pause()
        image = images[1][0]
        await images[1][1].pause()
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            asked = image.limiter.granted
            nursery.start_soon(replay, image, [(image.size // 2, 40 * LIMIT)])
            await images[1][1].resume()
            await trio.sleep(20)
            assert image.limiter.granted - asked == pytest.approx(20 * LIMIT, rel=0.05)
            assert all(pos >= image.size // 2 for pos, _, _ in source.reads[-40:])
            await trio.sleep(30)
            assert not image.replaying
            assert image.limiter.granted - asked == pytest.approx(50 * LIMIT, rel=0.05)
            nursery.cancel_scope.cancel()
