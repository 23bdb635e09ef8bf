"""The queue of a source: what becomes of a flight and of those who wait for it."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.fetch import Fetch
from qedfs.image import Image
from qedfs.overlay.overlay import Overlay
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER

CONTENT = b"s" * (8 * CLUSTER)


class Queue:
    """A queue in a nursery of its own, which ends without those who wait for its flights."""

    def __init__(self, source: FakeSource) -> None:
        self._source = source
        self.fetch: Fetch
        self.scope = trio.CancelScope()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                self.fetch = Fetch(remote(self._source), CLUSTER, nursery)
                task_status.started()
                await trio.sleep_forever()

    async def image(self) -> Image:
        data = empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data
        return Image("disk.raw", await Overlay.open(MemoryStorage(data)), self.fetch)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.05])
async def test_a_queue_that_ends_leaves_its_readers_an_error(
    autojump_clock: trio.testing.MockClock, seconds: float
) -> None:
    """Whether it ends while it connects or while it asks, nobody gets zeros for bytes, and nobody waits on."""
    source = FakeSource(CONTENT)
    async with trio.open_nursery() as nursery:
        queue = Queue(source)
        await nursery.start(queue.run)
        image = await queue.image()

        async def read() -> None:
            with pytest.raises(SourceUnreachable, match="closed"):
                await image.read(0, 512)

        source.gate = trio.Event()
        began = trio.current_time()
        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            readers.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(seconds)
            queue.scope.cancel()
        assert trio.current_time() - began < 1
        assert queue.fetch.flights() == []
        assert (queue.fetch.held_bytes, queue.fetch.background_bytes, queue.fetch.readers) == (0, 0, 0)


async def test_a_queue_that_has_ended_keeps_nobody_waiting(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        queue = Queue(FakeSource(CONTENT))
        await nursery.start(queue.run)
        image = await queue.image()
        await image.source_size()
        queue.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            began = trio.current_time()
            with pytest.raises((RuntimeError, QedfsError)):
                await image.read(0, 512)
            assert trio.current_time() == began
        assert queue.fetch.flights() == []
        assert (queue.fetch.held_bytes, queue.fetch.readers) == (0, 0)
