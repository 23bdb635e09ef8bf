"""A stream that has failed for good, and readers and guests who bring in all the same what it could not."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qedfs.errors import ReadOnlyOverlay, SourceChanged, SourceError, SourceUnreachable
from qedfs.image.image import Image
from qedfs.image.zero_range import make_zeros
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

CLUSTERS = 6
CONTENT = b"".join(bytes([65 + number]) * CLUSTER for number in range(CLUSTERS))


class ForReaders(FakeSource):
    """A source that refuses whatever is not urgent: a cache that lets only small requests through, say."""

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        if not urgent:
            await trio.sleep(self.round_trip)
            raise SourceError("nothing for the background")
        await super().read(pos, buffer, urgent=urgent)


async def failed(
    image: Image, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, state: State = State.FAILED
) -> StreamJob:
    job = StreamJob(image)
    nursery.start_soon(job.run)
    await trio.sleep(5)
    assert job.state is state
    assert "the stream has stopped" in caplog.text
    return job


async def test_readers_bring_in_everything(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    overlay = MemoryStorage(
        empty(cluster_size=CLUSTER, image_size=len(CONTENT) + 3 * CLUSTER, backing=b"http://fake/disk.raw").data
    )
    # The image is longer than the source: what lies behind that needs nobody.
    async with served(ForReaders(CONTENT), storage=overlay) as image, trio.open_nursery() as nursery:
        job = await failed(image, nursery, caplog)
        for pos in range(0, len(CONTENT), CLUSTER):
            await trio.sleep(10)
            assert job.state is State.FAILED
            assert await image.read(pos, CLUSTER) == CONTENT[pos : pos + CLUSTER]
        await trio.sleep(10)
        assert job.state is State.COMPLETE
        assert image.complete
        assert job.reason == ""
        assert await image.read(len(CONTENT), 512) == bytes(512)
    alone = await open_storage(MemoryStorage(overlay.bytes))
    assert alone.backing is None
    await alone.close()


async def test_what_was_dropped_meanwhile_needs_the_backing(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit into the backing comes between the look at what is missing and the end of the backing."""
    async with served(ForReaders(CONTENT)) as image, trio.open_nursery() as nursery:
        job = await failed(image, nursery, caplog)
        assert image.fetch is not None

        async def dropped(_: Image) -> None:
            image.overlay.dropping.count += 1

        with monkeypatch.context() as patch:
            patch.setattr(image.fetch, "landed", dropped)
            assert await image.read(0, len(CONTENT)) == CONTENT
            await trio.sleep(10)
            assert (image.overlay.missing, image.complete) == (0, False)
        image.counters.written += 1  # so that it looks again
        await trio.sleep(10)
        assert (image.complete, job.state) == (True, State.COMPLETE)


@pytest.mark.parametrize("changed", [False, True])
async def test_a_guest_writes_everything(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, changed: bool
) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        await image.read(0, CLUSTER)
        source.fail = SourceChanged("another version") if changed else SourceError("gone")
        job = await failed(image, nursery, caplog, State.SOURCE_CHANGED if changed else State.FAILED)
        for pos in range(CLUSTER, len(CONTENT), CLUSTER):
            assert not image.complete
            await image.write(pos, b"w" * CLUSTER)
        await trio.sleep(10)
        assert job.state is State.COMPLETE
        assert await image.read(0, CLUSTER) == CONTENT[:CLUSTER]
        assert await image.read(5 * CLUSTER, CLUSTER) == b"w" * CLUSTER


async def test_a_stream_that_the_user_has_stopped_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        job = StreamJob(image, enabled=False)
        nursery.start_soon(job.run)
        for pos in range(0, len(CONTENT), CLUSTER):
            await image.read(pos, CLUSTER)
        await trio.sleep(60)
        assert (job.state, image.complete) == (State.OFF, False)
        nursery.cancel_scope.cancel()


async def test_an_overlay_that_cannot_be_made_durable_is_not_complete(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    async def refused() -> None:
        await trio.lowlevel.checkpoint()
        tries.append(1)
        raise ReadOnlyOverlay("a barrier failed")

    source = ForReaders(CONTENT)
    async with served(source) as image, trio.open_nursery() as nursery:
        job = await failed(image, nursery, caplog)
        monkeypatch.setattr(image.overlay, "detach", refused)
        for pos in range(0, len(CONTENT), CLUSTER):
            await image.read(pos, CLUSTER)
        await trio.sleep(600)
        assert job.state is State.FAILED
        assert len(tries) == 1  # nothing has changed since
        nursery.cancel_scope.cancel()


async def test_a_source_that_was_never_there_is_not_needed_for_an_image_that_was_discarded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable() -> FakeSource:
        raise SourceUnreachable("nobody answers")

    async with served(FakeSource(CONTENT)) as image, trio.open_nursery() as nursery:
        assert image.source is not None
        monkeypatch.setattr(image.source, "_opener", unreachable)
        job = StreamJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(100)
        assert not image.complete
        await make_zeros(image, 0, len(CONTENT))
        await trio.sleep(100)
        assert job.state is State.COMPLETE
        assert bytes(await image.read(0, CLUSTER)) == bytes(CLUSTER)
        nursery.cancel_scope.cancel()
