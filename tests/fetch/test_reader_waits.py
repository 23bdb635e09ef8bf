"""How long readers waited for bytes of the source: counted as they felt it, from the question to the answer."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import SourceChanged, SourceUnreachable
from qedfs.fetch.queue import FetchQueue
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = bytes(range(256)) * (8 * CLUSTER // 256)
ROUND_TRIP = 3.0


def waits(image: Image) -> tuple[int, float]:
    """(how many waits, seconds of all)"""
    fetch = fetch_of(image)
    return fetch.waits.up_to()[-1], round(fetch.waits.seconds, 1)


def fetch_of(image: Image) -> FetchQueue:
    assert image.fetch is not None
    return image.fetch


async def test_the_first_connection_is_a_part_of_the_wait(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT, round_trip=ROUND_TRIP)) as image:
        await image.read(0, 512)
        assert waits(image) == (1, 2 * ROUND_TRIP)  # one to connect, one to ask
        await image.read(2 * CLUSTER, 512)
        assert waits(image) == (2, 3 * ROUND_TRIP)


async def test_who_comes_while_another_connects_waits_for_the_rest_only(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT, round_trip=ROUND_TRIP)) as image, trio.open_nursery() as nursery:
        nursery.start_soon(image.read, 0, 512)
        await trio.sleep(1)
        assert fetch_of(image).readers == 1
        nursery.start_soon(image.read, 2 * CLUSTER, 512)
        await trio.testing.wait_all_tasks_blocked()
        assert fetch_of(image).readers == 2
        await trio.sleep(3 * ROUND_TRIP)
        assert waits(image) == (2, 2 * ROUND_TRIP + 2 * ROUND_TRIP - 1)


async def test_a_write_in_part_waits_like_a_reader(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT, round_trip=ROUND_TRIP)) as image:
        await image.write(5, b"guest")
        assert waits(image) == (1, 2 * ROUND_TRIP)


async def test_a_connection_that_never_comes_was_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async def refuse() -> FakeSource:
        raise SourceUnreachable("connection refused")

    async with served(FakeSource(CONTENT), deadline_seconds=5) as image:
        fetch_of(image).remote._opener = refuse
        with pytest.raises(SourceUnreachable):
            await image.read(0, 512)
        count, seconds = waits(image)
        assert count == 1
        assert 4 < seconds < 6
        assert fetch_of(image).readers == 0


async def test_what_is_answered_at_once_is_no_wait(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=ROUND_TRIP)
    async with served(source, image_size=12 * CLUSTER) as image:
        await image.read(0, 512)
        await trio.sleep(1)  # until it has been adopted
        known = waits(image)
        await image.read(0, CLUSTER)  # local
        await image.read(10 * CLUSTER, CLUSTER)  # behind the source's end
        assert image.version is not None
        image.version.refuse(SourceChanged("another version"))
        with pytest.raises(SourceChanged):
            await image.read(4 * CLUSTER, 512)
        assert waits(image) == known


async def test_the_stream_is_no_reader(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT, round_trip=ROUND_TRIP)) as image:
        with trio.fail_after(60):
            await StreamJob(image).run()
        assert image.complete
        assert waits(image) == (0, 0.0)
