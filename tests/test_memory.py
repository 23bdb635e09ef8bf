"""What fetched bytes take in memory is bounded, whatever clusters an overlay has; readers are served all the same."""

from __future__ import annotations

import pytest
import trio

from qedfs.image import Image
from qedfs.stream.job import State, StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

MIB = 1 << 20
LARGE = 8 * MIB
CONTENT = bytes(range(256)) * (6 * LARGE // 256)


async def check(image: Image, pos: int, size: int) -> None:
    assert bytes(await image.read(pos, size)) == CONTENT[pos : pos + size]


async def test_of_large_clusters_readers_get_what_they_ask_for(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, cluster_size=LARGE) as image:
        assert image.fetch is not None
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(check, image, number * LARGE + 512, 4096)
            await trio.testing.wait_all_tasks_blocked()
            assert image.fetch.held_bytes == 0
        assert sorted(source.reads) == [(number * LARGE + 512, 4096, True) for number in range(6)]
        # Across two of them, and behind the source's end.
        await check(image, 2 * LARGE - 512, 1024)
        assert image.counters.kept == 0


async def test_a_reader_does_not_wait_for_a_large_cluster(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=10)
    async with served(source, cluster_size=LARGE) as image:
        await image.source_size()
        assert image.fetch is not None
        image.fetch.start(0, 1, taker=image)
        await trio.sleep(1)
        source.round_trip = 0.02
        began = trio.current_time()
        await check(image, 0, 512)
        assert trio.current_time() - began == pytest.approx(0.02)
        await trio.sleep(20)
        assert image.counters.kept == LARGE
        await check(image, 0, LARGE)
        assert source.bytes_read == LARGE + 512


async def test_large_clusters_are_streamed_within_the_bound(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.fetch.MOST_HELD_BYTES", 4 * LARGE)
    source = FakeSource(CONTENT)
    async with served(source, cluster_size=LARGE) as image, trio.open_nursery() as nursery:
        assert image.fetch is not None
        most = 0
        job = StreamJob(image)
        nursery.start_soon(job.run)
        while job.state is not State.COMPLETE:
            most = max(most, image.fetch.held_bytes)
            await trio.sleep(0.001)
        assert LARGE <= most <= 2 * LARGE
        await check(image, 0, len(CONTENT))
        assert source.bytes_read == len(CONTENT)


async def test_a_step_brings_in_a_large_cluster(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source, cluster_size=LARGE) as image:
        assert await StreamJob(image, enabled=False).step(0) == (0, LARGE, LARGE)
        assert image.counters.kept == LARGE


async def test_a_step_waits_for_its_own_bytes_only(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=5)
    async with served(source) as image:
        await image.source_size()
        assert image.fetch is not None
        image.fetch.start(20, 4, taker=image)
        await trio.sleep(1)
        source.round_trip = 0.02
        began = trio.current_time()
        pos, size, _ = await StreamJob(image, enabled=False).step(0)
        assert pos == 0
        assert size > 0
        assert trio.current_time() - began < 1


async def test_without_room_readers_get_what_they_ask_for(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.fetch.MOST_HELD_BYTES", 4 * CLUSTER)
    source = FakeSource(CONTENT)
    source.gate = trio.Event()
    async with served(source) as image, trio.open_nursery() as nursery:
        await image.source_size()
        assert image.fetch is not None
        for number in range(16):
            nursery.start_soon(check, image, number * 2 * CLUSTER + 100, 4096)
        await trio.testing.wait_all_tasks_blocked()
        assert image.fetch.held_bytes == 4 * CLUSTER
        assert sorted(size for _, size, _ in source.reads) == 12 * [4096] + 4 * [CLUSTER]
        # What is under way already is joined.
        joined = next(pos for pos, size, _ in source.reads if size == CLUSTER)
        nursery.start_soon(check, image, joined, 512)
        await trio.testing.wait_all_tasks_blocked()
        assert len(source.reads) == 16
        source.gate.set()
