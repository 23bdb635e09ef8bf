"""The stream and a guest that writes where it goes: nothing crosses the wire that the guest is about to overwrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import trio

from qedfs.errors import NoSpace
from qedfs.image.image import Image
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay import loop_writes
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

T = TypeVar("T")
CONTENT = bytes(range(256)) * (16 * CLUSTER // 256)
CLAIMED = 8 * CLUSTER  # as large as a request of the stream
SLOW_SECONDS = 10.0


@pytest.fixture(autouse=True)
def writes_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host with many dirty pages, a guest's write of this size leaves the event loop."""
    monkeypatch.setattr(loop_writes, "MOST_BYTES", CLUSTER)


class SlowStart(MemoryStorage):
    """The first call that is given to a thread waits for the disk."""

    slow = False

    async def in_thread(self, function: Callable[[], T]) -> T:
        if self.slow:
            self.slow = False
            await trio.sleep(SLOW_SECONDS)
        return await super().in_thread(function)


def slow_storage() -> SlowStart:
    return SlowStart(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)


async def write(image: Image) -> None:
    await image.write(0, b"g" * CLAIMED)


async def test_the_stream_leaves_a_write_its_clusters(autojump_clock: trio.testing.MockClock) -> None:
    source, storage = FakeSource(CONTENT, round_trip=0.001), slow_storage()
    async with served(source, storage=storage) as image, trio.open_nursery() as nursery:
        storage.slow = True
        nursery.start_soon(write, image)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await StreamJob(image).run()
        assert image.complete
        assert SLOW_SECONDS <= trio.current_time() - began < SLOW_SECONDS + 1
        assert source.bytes_read == len(CONTENT) - CLAIMED
        assert await image.read(0, len(CONTENT)) == b"g" * CLAIMED + CONTENT[CLAIMED:]


async def test_what_a_failed_write_leaves_missing_is_brought_in(autojump_clock: trio.testing.MockClock) -> None:
    source, storage = FakeSource(CONTENT, round_trip=0.001), slow_storage()
    async with served(source, storage=storage) as image, trio.open_nursery() as nursery:
        job = StreamJob(image)

        async def fail() -> None:
            with pytest.raises(NoSpace):
                await write(image)

        storage.slow = True
        nursery.start_soon(fail)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(job.run)
        await trio.sleep(SLOW_SECONDS / 2)
        assert job.state is State.RUNNING
        storage.fail("write", NoSpace("full"))
        await trio.sleep(SLOW_SECONDS)
        assert image.complete
        assert source.bytes_read == len(CONTENT)
        assert await image.read(0, len(CONTENT)) == CONTENT


async def test_a_step_over_a_write_is_no_failure(autojump_clock: trio.testing.MockClock) -> None:
    source, storage = FakeSource(CONTENT, round_trip=0.001), slow_storage()
    async with served(source, storage=storage) as image, trio.open_nursery() as nursery:
        storage.slow = True
        nursery.start_soon(write, image)
        await trio.testing.wait_all_tasks_blocked()
        job = StreamJob(image, enabled=False)
        pos: int | None = 0
        while pos is not None:
            _, _, pos = await job.step(pos)
        assert not image.complete  # a part of it is still missing
        await trio.sleep(SLOW_SECONDS)
        await job.step(0)
        assert await image.read(0, len(CONTENT)) == b"g" * CLAIMED + CONTENT[CLAIMED:]
