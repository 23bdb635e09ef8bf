"""Readers beside a flight of the background that is late: they ask for their bytes themselves, and only then."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = random.Random(2).randbytes(64 * CLUSTER)
FAST, DEADLINE = 0.02, 30.0


class Lossy(FakeSource):
    """The answer to the next background read gets lost, or comes after `seconds`; so do urgent ones if `urgent`."""

    def __init__(self, content: bytes, *, seconds: float = float("inf"), urgent: bool = False) -> None:
        super().__init__(content, round_trip=FAST)
        self.seconds = seconds
        self.urgent = urgent
        self.lose = 0

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        if self.lose and not urgent:
            self.lose -= 1
            self.reads.append((pos, len(buffer), urgent))
            await trio.sleep(self.seconds)
            buffer[:] = self.content[pos : pos + len(buffer)]
        elif urgent and self.urgent:
            await trio.sleep_forever()
        else:
            await super().read(pos, buffer, urgent=urgent)


class SlowLink(FakeSource):
    """All answers share one link of so many bytes per second, in the order in which they were asked for."""

    def __init__(self, content: bytes, rate: float) -> None:
        super().__init__(content, round_trip=FAST)
        self.rate = rate
        self.link = trio.Lock()

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        async with self.link:
            await trio.sleep(len(buffer) / self.rate)
        self.received += len(buffer)
        await super().read(pos, buffer, urgent=urgent)


async def seconds_to_read(image: Image, pos: int) -> float:
    began = trio.current_time()
    assert bytes(await image.read(pos, 512)) == CONTENT[pos : pos + 512]
    return trio.current_time() - began


def start(image: Image) -> None:
    """One request of the background for the first four clusters."""
    assert image.fetch is not None
    image.fetch.start(0, 4, consumer=image.consumer)


async def test_an_answer_that_never_comes_costs_its_readers_a_part_of_their_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = Lossy(CONTENT)
    async with served(source) as image:
        await image.source_size()
        source.lose = 1
        start(image)
        await trio.sleep(1)
        assert DEADLINE / 3 < await seconds_to_read(image, 512) < DEADLINE / 2
        for cluster in range(4):
            assert await seconds_to_read(image, cluster * CLUSTER) == pytest.approx(FAST)
        assert [size for _, size, urgent in source.reads if urgent] == [512] * 5


async def test_where_the_link_is_known_a_second_is_late(autojump_clock: trio.testing.MockClock) -> None:
    source = Lossy(CONTENT)
    async with served(source) as image:
        await image.source_size()
        assert image.fetch is not None
        image.fetch.window._best = 100e6
        source.lose = 1
        start(image)
        await trio.sleep(0.5)
        assert await seconds_to_read(image, CLUSTER) == pytest.approx(0.5 + FAST)
        assert await seconds_to_read(image, 2 * CLUSTER) == pytest.approx(FAST)


async def test_a_flight_that_lands_first_answers_and_is_kept_once(autojump_clock: trio.testing.MockClock) -> None:
    source = Lossy(CONTENT, seconds=DEADLINE / 2, urgent=True)
    async with served(source) as image:
        await image.source_size()
        source.lose = 1
        start(image)
        assert await seconds_to_read(image, 0) == pytest.approx(DEADLINE / 2)
        await trio.sleep(1)
        assert (image.counters.kept, image.populated) == (4 * CLUSTER, 4 * CLUSTER)
        assert source.in_flight == 0


async def test_a_stream_with_a_lost_answer_is_read_all_along(autojump_clock: trio.testing.MockClock) -> None:
    source = Lossy(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        source.lose = 2
        nursery.start_soon(StreamJob(image).run)
        await trio.sleep(5)
        for pos in range(0, len(CONTENT), CLUSTER):
            assert await seconds_to_read(image, pos) < DEADLINE / 2
        await trio.sleep(12 * DEADLINE)
        assert image.complete
        for pos in range(0, len(CONTENT), CLUSTER):
            assert await seconds_to_read(image, pos) == 0


@pytest.mark.parametrize("rate", [100_000, 200_000, 1_000_000])
async def test_on_a_slow_link_little_crosses_twice(autojump_clock: trio.testing.MockClock, rate: int) -> None:
    source = SlowLink(CONTENT, rate)
    async with served(source) as image:
        began = trio.current_time()
        for pos in range(0, len(CONTENT), 2 * CLUSTER):
            assert bytes(await image.read(pos, 2 * CLUSTER)) == CONTENT[pos : pos + 2 * CLUSTER]
        assert source.bytes_read <= 1.1 * len(CONTENT)
        assert trio.current_time() - began < 1.2 * len(CONTENT) / rate


async def test_a_stream_over_a_slow_link_leaves_room_for_readers(autojump_clock: trio.testing.MockClock) -> None:
    source = SlowLink(CONTENT * 6, 125_000)
    async with served(source) as image, trio.open_nursery() as nursery:
        nursery.start_soon(StreamJob(image).run)
        await trio.sleep(2 * DEADLINE)  # until the link is known
        for cluster in range(1, 5):
            await trio.sleep(DEADLINE / 2)
            began = trio.current_time()
            await image.read(len(source.content) - cluster * CLUSTER, 512)
            assert trio.current_time() - began < DEADLINE / 2
        await trio.sleep(6 * DEADLINE)
        assert image.complete
        assert source.bytes_read <= 1.01 * len(source.content)
