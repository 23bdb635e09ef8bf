"""An image whose source is gone is filled from another copy: only what is missing, and only from the right copy."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.image.image import Image
from qedfs.image.source_errors import OnSourceError
from qedfs.image.stalls import Stalls
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.populate import Populate, Progress
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

CONTENT = random.Random(7).randbytes(40 * CLUSTER)
OTHER = random.Random(8).randbytes(40 * CLUSTER)
GONE = SourceUnreachable("http://fake/disk.raw: connection refused")


async def gone(source: FakeSource) -> None:
    await trio.sleep(1)  # what it has brought is adopted
    source.fail = GONE


async def populate(image: Image, copy: FakeSource, *, force: bool = False) -> Populate:
    job = Populate(image, remote(copy), force=force)
    await job.run()
    return job


async def test_only_what_is_missing_is_taken(autojump_clock: trio.testing.MockClock) -> None:
    source, copy = FakeSource(CONTENT), FakeSource(CONTENT, etag='"another server"')
    async with served(source) as image:
        await image.read(0, 8 * CLUSTER)
        await image.write(10 * CLUSTER + 100, b"guest" * 100)
        await image.write(12 * CLUSTER, b"w" * CLUSTER)
        await image.overlay.discard(14, 2)
        await gone(source)
        job = await populate(image, copy)
        assert (job.state, job.error) == (Progress.COMPLETE, None)
        assert image.complete
        expected = bytearray(CONTENT)
        expected[10 * CLUSTER + 100 : 10 * CLUSTER + 600] = b"guest" * 100
        expected[12 * CLUSTER : 13 * CLUSTER] = b"w" * CLUSTER
        expected[14 * CLUSTER : 16 * CLUSTER] = bytes(2 * CLUSTER)
        assert await image.read(0, len(CONTENT)) == expected
        assert job.done == len(CONTENT) - 12 * CLUSTER
        assert copy.is_closed


@pytest.mark.expect_log("cannot populate")
async def test_a_copy_of_another_disk_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        await image.read(0, 8 * CLUSTER)
        await gone(source)
        missing = image.overlay.missing
        job = await populate(image, FakeSource(OTHER))
        assert job.state is Progress.FAILED
        assert isinstance(job.error, SourceChanged)
        assert "is not the disk that disk.raw was started from (the bytes at " in str(job.error)
        for size in (39 * CLUSTER, 41 * CLUSTER):
            job = await populate(image, FakeSource(bytes(size)), force=True)
            assert isinstance(job.error, SourceChanged)
        assert image.overlay.missing == missing
        assert image.rescue is None
        assert (await populate(image, FakeSource(OTHER), force=True)).state is Progress.COMPLETE


@pytest.mark.expect_log("cannot populate")
async def test_blocks_of_an_earlier_session_are_compared(autojump_clock: trio.testing.MockClock) -> None:
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)
    async with served(FakeSource(CONTENT), storage=storage) as image:
        await image.read(0, 8 * CLUSTER)
    for content, state in ((OTHER, Progress.FAILED), (CONTENT, Progress.COMPLETE)):
        source, storage = FakeSource(CONTENT), MemoryStorage(storage.bytes)
        source.fail = GONE
        async with served(source, storage=storage) as image:
            assert image.source is not None
            assert image.source.identity is None  # it was away from the start
            assert (await populate(image, FakeSource(content))).state is state


@pytest.mark.expect_log("cannot populate")
async def test_without_a_block_to_compare_only_an_empty_overlay_is_filled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = FakeSource(CONTENT)
    source.fail = GONE
    async with served(source) as image:
        await image.write(0, b"g" * CLUSTER)
        job = await populate(image, FakeSource(CONTENT))
        assert isinstance(job.error, SourceError)
        assert str(job.error).endswith("--force if it is the right disk")
        assert (await populate(image, FakeSource(CONTENT), force=True)).state is Progress.COMPLETE
    async with served(source) as image:
        assert (await populate(image, FakeSource(CONTENT[:-CLUSTER]))).state is Progress.FAILED
        assert (await populate(image, FakeSource(CONTENT))).state is Progress.COMPLETE


async def test_requests_that_wait_are_answered_from_the_copy(autojump_clock: trio.testing.MockClock) -> None:
    source, copy = FakeSource(CONTENT), FakeSource(CONTENT, round_trip=1.0)
    async with served(source) as image, trio.open_nursery() as nursery:
        await image.read(0, CLUSTER)
        image.stalls = Stalls(OnSourceError(wait=True))
        await gone(source)
        answers: list[bytes] = []

        async def read() -> None:
            answers.append(bytes(await image.read(30 * CLUSTER, CLUSTER)))

        nursery.start_soon(read)
        nursery.start_soon(image.write, 32 * CLUSTER + 512, b"g" * 512)
        await trio.sleep(100)
        assert image.stalls.count == 2
        assert (await populate(image, copy)).state is Progress.COMPLETE
    assert answers == [CONTENT[30 * CLUSTER : 31 * CLUSTER]]


async def test_a_reader_that_waits_reads_an_image_that_needs_no_source(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        image.stalls = Stalls(OnSourceError(wait=True))
        await gone(source)
        nursery.start_soon(image.read, 3 * CLUSTER, CLUSTER)
        await trio.sleep(100)
        await image.write(0, CONTENT)
        await StreamJob(image).run()
        assert image.complete


async def test_a_guest_that_writes_meanwhile_wins(autojump_clock: trio.testing.MockClock) -> None:
    source, copy = FakeSource(CONTENT), FakeSource(CONTENT)
    expected = bytearray(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        await image.read(0, CLUSTER)
        await gone(source)
        copy.round_trip = 5.0
        job = Populate(image, remote(copy), force=False)
        nursery.start_soon(job.run)
        chosen = random.Random(3)
        for number in range(60):
            pos = chosen.randrange(len(CONTENT) - 70000)
            data = bytes([number + 1]) * chosen.choice((512, 4096, 65536))
            await image.write(pos, data)
            expected[pos : pos + len(data)] = data
            await trio.sleep(chosen.random())
        await trio.sleep(600)
        assert job.state is Progress.COMPLETE
        assert await image.read(0, len(CONTENT)) == expected


async def test_the_stream_that_waits_for_the_source_ends_at_once(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        await image.read(0, CLUSTER)
        source.gate = trio.Event()  # for ever: its flights stay in the air
        stream = StreamJob(image)
        jobs = ImageJobs(stream)
        nursery.start_soon(stream.run)
        nursery.start_soon(jobs.run)
        await trio.sleep(10)
        jobs.begin_populate(remote(FakeSource(CONTENT)), force=False)
        await trio.sleep(5)
        assert image.complete
        assert stream.state is State.COMPLETE
        nursery.cancel_scope.cancel()


async def test_a_cancelled_one_keeps_what_it_has(autojump_clock: trio.testing.MockClock) -> None:
    source, copy = FakeSource(CONTENT), FakeSource(CONTENT)
    async with served(source, cluster_size=1 << 21) as image, trio.open_nursery() as nursery:
        await image.read(0, 512)
        await gone(source)
        job = Populate(image, remote(copy), force=True)
        copy.gate = trio.Event()
        nursery.start_soon(job.run)
        await trio.sleep(1)
        assert job.active
        job.cancel()
        await trio.sleep(1)
        assert job.state is Progress.CANCELLED
        assert not image.complete
        assert copy.is_closed
        with pytest.raises(SourceUnreachable):
            await image.read(1 << 21, 512)


async def test_holes_of_the_copy_are_not_read(autojump_clock: trio.testing.MockClock) -> None:
    content = CONTENT[: 4 * CLUSTER] + bytes(36 * CLUSTER)
    source, copy = FakeSource(content), FakeSource(content)
    copy.holes = [(4 * CLUSTER, 36 * CLUSTER)]
    async with served(source) as image:
        await image.read(0, CLUSTER)
        await gone(source)
        assert (await populate(image, copy)).state is Progress.COMPLETE
        assert max(pos + size for pos, size, _ in copy.reads) <= 4 * CLUSTER
        assert await image.read(0, len(content)) == content


async def test_a_reader_that_waits_for_an_answer_does_not_ask_the_source_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source, copy = FakeSource(CONTENT), FakeSource(CONTENT)
    async with served(source, copy_on_read=False) as image, trio.open_nursery() as nursery:
        await image.read(0, CLUSTER)
        await image.source_size()
        source.gate = trio.Event()  # for ever
        answers: list[float] = []

        async def read() -> None:
            assert await image.read(3 * CLUSTER, CLUSTER) == CONTENT[3 * CLUSTER : 4 * CLUSTER]
            answers.append(trio.current_time())

        nursery.start_soon(read)
        await trio.sleep(1)
        asked = len(source.reads)
        assert (await populate(image, copy, force=True)).state is Progress.COMPLETE
        await trio.sleep(1)
        assert answers
        assert len(source.reads) == asked
