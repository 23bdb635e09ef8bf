"""What fetched bytes take in memory is bounded, whatever clusters an overlay has; readers are served all the same."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.image.image import Image
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
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
            assert image.fetch._budget.held == 0
        assert sorted(source.reads) == [(number * LARGE + 512, 4096, True) for number in range(6)]
        # Across two of them, and behind the source's end.
        await check(image, 2 * LARGE - 512, 1024)
        assert image.counters.kept == 0


async def test_a_reader_does_not_wait_for_a_large_cluster(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=10)
    async with served(source, cluster_size=LARGE) as image:
        await image.source_size()
        assert image.fetch is not None
        image.fetch.start(0, 1, consumer=image.consumer)
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
    monkeypatch.setattr("qedfs.fetch.budget.MOST_HELD_BYTES", 4 * LARGE)
    source = FakeSource(CONTENT)
    async with served(source, cluster_size=LARGE) as image, trio.open_nursery() as nursery:
        assert image.fetch is not None
        most = 0
        job = StreamJob(image)
        nursery.start_soon(job.run)
        while job.state is not State.COMPLETE:
            most = max(most, image.fetch._budget.held)
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
        image.fetch.start(20, 4, consumer=image.consumer)
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
    monkeypatch.setattr("qedfs.fetch.budget.MOST_HELD_BYTES", 4 * CLUSTER)
    source = FakeSource(CONTENT)
    source.gate = trio.Event()
    async with served(source) as image, trio.open_nursery() as nursery:
        await image.source_size()
        assert image.fetch is not None
        for number in range(16):
            nursery.start_soon(check, image, number * 2 * CLUSTER + 100, 4096)
        await trio.testing.wait_all_tasks_blocked()
        assert image.fetch._budget.held == 4 * CLUSTER
        assert sorted(size for _, size, _ in source.reads) == 12 * [4096] + 4 * [CLUSTER]
        # What is under way already is joined.
        joined = next(pos for pos, size, _ in source.reads if size == CLUSTER)
        nursery.start_soon(check, image, joined, 512)
        await trio.testing.wait_all_tasks_blocked()
        assert len(source.reads) == 16
        source.gate.set()


async def test_writes_in_part_hold_a_bounded_number_of_clusters(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.image.rmw_budget.MOST_BYTES", 4 * LARGE)
    source = FakeSource(CONTENT)
    expected = bytearray(CONTENT)
    async with served(source, cluster_size=LARGE) as image:
        await image.source_size()
        async with trio.open_nursery() as nursery:
            for border in range(1, 6):
                pos = border * LARGE - 512
                expected[pos : pos + 1024] = b"w" * 1024
                nursery.start_soon(image.write, pos, b"w" * 1024)
        assert source.most_in_flight <= 4
        for pos in range(0, len(CONTENT), LARGE):
            assert await image.read(pos, LARGE) == expected[pos : pos + LARGE]


async def test_writes_in_part_that_find_no_room_fail_in_time(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.image.rmw_budget.MOST_BYTES", LARGE)
    source = FakeSource(CONTENT)
    async with served(source, cluster_size=LARGE, deadline_seconds=5) as image:
        await image.source_size()

        async def write(number: int) -> None:
            with pytest.raises(SourceUnreachable):
                await image.write(number * LARGE, b"w" * 512)

        source.gate = trio.Event()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(write, number)
        assert trio.current_time() - began < 2 * 5 + 2
        source.gate.set()
        await image.write(0, b"w" * 512)
        await check(image, 512, 512)
