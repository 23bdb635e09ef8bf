"""What an image does with fetched bytes: on a full disk, on a slow one, and if they were fetched for another image."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.errors import NoSpace
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

CONTENT = random.Random(7).randbytes(40 * CLUSTER)


async def read(image: Image, pos: int, size: int) -> bytes:
    return bytes(await image.read(pos, size))


async def test_a_full_disk_costs_the_reader_nothing(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)
    async with served(source, storage=storage) as image:
        await read(image, 0, 512)
        storage.fail("write", NoSpace("full"), forever=True)
        storage.fail("resize", NoSpace("full"), forever=True)
        assert await read(image, CLUSTER, CLUSTER) == CONTENT[CLUSTER : 2 * CLUSTER]
        await trio.sleep(1)
        with pytest.raises(NoSpace):
            await image.write(5 * CLUSTER, b"z" * CLUSTER)
        noticed = image.full
        assert noticed is not None
        storage.mend()
        await trio.sleep(10)
        assert await read(image, CLUSTER, CLUSTER) == CONTENT[CLUSTER : 2 * CLUSTER]
        await trio.sleep(1)
        assert image.full is None
        assert await read(image, 5 * CLUSTER, CLUSTER) == CONTENT[5 * CLUSTER : 6 * CLUSTER]


async def test_a_full_disk_is_told_of_until_something_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await image.source_size()
        image.condition.note(Cause.NO_SPACE, NoSpace("full"))  # a while ago
        # As while a write in part waits for what it needs beside this.
        with image.overlay._pending.merging([5]):
            await image.consumer.take(5 * CLUSTER, bytearray(CONTENT[:CLUSTER]), CLUSTER, asked=True)
        assert image.full is not None
        await read(image, 0, 512)
        await trio.sleep(1)
        assert image.full is None


async def test_bytes_that_wait_for_a_slow_disk_are_bounded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.fetch.budget.MOST_HELD_BYTES", 4 * CLUSTER)
    source = FakeSource(CONTENT)
    async with served(source) as image:
        real = image.overlay.adopt

        async def slow(pos: int, buffer: bytearray, size: int, *, cold: bool = False) -> int:
            await trio.sleep(60)
            return await real(pos, buffer, size, cold=cold)

        monkeypatch.setattr(image.overlay, "adopt", slow)
        assert image.fetch is not None
        for cluster in range(0, 40, 2):
            assert await read(image, cluster * CLUSTER, 512) == CONTENT[cluster * CLUSTER : cluster * CLUSTER + 512]
            assert image.fetch._budget.held <= 5 * CLUSTER
        await trio.sleep(200)
        assert await read(image, 0, len(CONTENT)) == CONTENT


async def second_image(first: Image, size: int) -> Image:
    """Another overlay on the source of `first`, with a size of its own."""
    data = empty(cluster_size=CLUSTER, image_size=size, backing=b"http://fake/disk.raw").data
    image = Image("second.raw", await open_storage(MemoryStorage(data)), first.fetch)
    await image.overlay.count_missing()
    return image


async def test_images_of_different_sizes_share_a_source(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    small = 3 * CLUSTER + 512
    async with served(source, image_size=small) as first:
        second = await second_image(first, len(CONTENT))
        source.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, first, 3 * CLUSTER, 512)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(_check_image, second, 3 * CLUSTER, CLUSTER)
            await trio.testing.wait_all_tasks_blocked()
            source.gate.set()
        await trio.sleep(1)
        assert await read(second, 0, len(CONTENT)) == CONTENT
        assert await read(first, 0, small) == CONTENT[:small]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(StreamJob(first).run)
            nursery.start_soon(StreamJob(second).run)
        assert await read(second, 0, len(CONTENT)) == CONTENT


async def _check_image(image: Image, pos: int, size: int) -> None:
    assert await read(image, pos, size) == CONTENT[pos : pos + size]
