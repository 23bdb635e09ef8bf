"""An image that grows while it is read, written and streamed, and what keeps it from growing."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.errors import InStandby, ReadOnlyOverlay, UsageError
from qedfs.image.growth import grow
from qedfs.image.image import Image
from qedfs.image.seek import seek
from qedfs.image.write_gate import WriteGate, Writes
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

SIZE = 40 * CLUSTER - 1024
CONTENT = random.Random(3).randbytes(SIZE)
LARGER = 100 * CLUSTER + 512


async def completed(image: Image) -> None:
    while not image.complete:  # noqa: ASYNC110 - on the mock clock
        await trio.sleep(0.1)


@pytest.mark.parametrize("streamed", ["before", "meanwhile", "after"])
async def test_what_is_new_reads_as_zeros_wherever_the_stream_is(
    streamed: str, autojump_clock: trio.testing.MockClock
) -> None:
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=SIZE, backing=b"http://fake/disk.raw").data)
    async with served(FakeSource(CONTENT), storage=storage, image_size=SIZE) as image:
        job = StreamJob(image, enabled=streamed != "after")
        async with trio.open_nursery() as nursery:
            if streamed != "after":
                nursery.start_soon(job.run)
            if streamed == "before":
                await completed(image)
            for size in (SIZE, SIZE + 512, LARGER):
                await grow(image, size)
                assert (image.size, image.overlay.image_size) == (size, size)
                assert bytes(await image.read(SIZE - 100, 1 << 20)) == CONTENT[-100:].ljust(
                    min(1 << 20, size - SIZE + 100), b"\0"
                )
            assert job.total == LARGER
            if streamed == "after":
                nursery.start_soon(StreamJob(image).run)
            await completed(image)
            nursery.cancel_scope.cancel()
        assert image.populated == LARGER
        assert bytes(await image.read(0, LARGER)) == CONTENT.ljust(LARGER, b"\0")
        assert await seek(image, SIZE, hole=False) is None or await seek(image, 40 * CLUSTER, hole=False) is None


async def test_the_progress_of_a_stream_counts_what_is_new(autojump_clock: trio.testing.MockClock) -> None:
    # A table maps 512 MiB here; the source is a hole but for its first cluster.
    source = FakeSource(CONTENT[:CLUSTER])
    async with served(source, image_size=3 << 30) as image:
        source.gate = trio.Event()
        job = StreamJob(image)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run)
            await trio.sleep(1)
            await grow(image, (3 << 30) + (1 << 28))
            source.gate.set()
            await completed(image)
            assert job.progress == job.total == (3 << 30) + (1 << 28)
            nursery.cancel_scope.cancel()


async def test_over_a_larger_backing_it_does_not_grow() -> None:
    async with served(FakeSource(CONTENT), image_size=CLUSTER + 512) as image:
        with pytest.raises(UsageError, match=f"its backing has {SIZE} bytes, and the image {CLUSTER + 512}"):
            await grow(image, LARGER)
        assert image.size == CLUSTER + 512
        await image.overlay.detach()  # nothing of the backing can be shown any more
        await grow(image, LARGER)
        assert image.size == LARGER


@pytest.mark.parametrize(("size", "text"), [(SIZE - 512, "only grows"), (SIZE + 1, "disk.raw: .* multiple of 512")])
async def test_sizes_that_are_refused(size: int, text: str) -> None:
    async with served(FakeSource(CONTENT)) as image:
        with pytest.raises(UsageError, match=text):
            await grow(image, size)


async def test_in_standby_and_read_only_it_keeps_its_size() -> None:
    async with served(FakeSource(CONTENT)) as image:
        image.gate = WriteGate("disk.raw", Writes.REFUSE)
        with pytest.raises(InStandby):
            await grow(image, LARGER)
        image.gate = None
        image.overlay.storage.writable = False
        with pytest.raises(ReadOnlyOverlay):
            await grow(image, LARGER)
        image.overlay.storage.writable = True
