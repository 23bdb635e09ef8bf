"""The limit of a stream: kept, spread out evenly, and changed while it runs."""

from __future__ import annotations

import random

import trio
import trio.testing

from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = random.Random(5).randbytes(320 * CLUSTER)


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
