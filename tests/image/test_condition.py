"""What is wrong with an image is told for as long as it is: the end of one trouble takes no other one with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from qedfs.control.monitoring.status import image_status
from qedfs.errors import NoSpace, QedfsError, SourceUnreachable
from qedfs.image.condition import Cause, Condition
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from tests.control.support import Served
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served, tended

OF_OVERLAY = {Cause.DAMAGED, Cause.BARRIER_FAILED, Cause.FULL_AT_OPENING, Cause.COMMIT_FAILED}
ZEROS = bytes(8 * CLUSTER)  # keeping them changes entries only: nothing is written before the commit


def status(image: Image) -> dict[str, Any]:
    """As `qedfs status --json` shows the image, whose stream is off."""
    return image_status(Served("disk.raw", "disk.qed", image, StreamJob(image, enabled=False)), None)


@pytest.mark.expect_log("cannot write")
async def test_a_failed_commit_is_told_though_the_source_answers(autojump_clock: trio.testing.MockClock) -> None:
    built = empty(cluster_size=CLUSTER, image_size=len(ZEROS), backing=b"http://fake/disk.raw")
    storage = MemoryStorage(built.data)
    async with served(FakeSource(ZEROS), storage=storage) as image:
        await image.read(0, 512)
        await trio.sleep(3)  # the pin is stored, and the first cluster's entry is committed
        storage.fail("write", QedfsError("cannot write: Input/output error"), forever=True)
        await image.read(CLUSTER, 512)
        await trio.sleep(3)
        assert status(image)["error"] == "cannot write: Input/output error"
        await image.read(2 * CLUSTER, 512)
        await trio.sleep(0.1)  # it is kept as well
        assert image.populated == 3 * CLUSTER
        assert status(image)["error"] == "cannot write: Input/output error"
        storage.mend()
        await trio.sleep(3)
        assert status(image)["error"] is None


@pytest.mark.expect_log("cannot write")
async def test_a_complete_image_tells_of_a_failed_commit(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """With a journal a write returns before its entry is in the overlay's tables."""
    storage = MemoryStorage(empty(image_size=len(ZEROS), backing=b"").data, name="disk")
    image = Image("disk.raw", await open_storage(storage, journal_folder=tmp_path), None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tended, image)
        await image.write(0, b"g" * CLUSTER)
        storage.fail("write", QedfsError("cannot write: Input/output error"), forever=True)
        await trio.sleep(3)
        assert status(image)["error"] == "cannot write: Input/output error"
        storage.mend()
        await trio.sleep(3)
        assert status(image)["error"] is None
        nursery.cancel_scope.cancel()
    await image.close()


@pytest.mark.expect_log("cannot write")
async def test_what_cannot_be_kept_is_told_though_readers_get_it(autojump_clock: trio.testing.MockClock) -> None:
    content = b"s" * len(ZEROS)
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(content), backing=b"http://fake/disk.raw").data)
    async with served(FakeSource(content), storage=storage) as image:
        await image.read(0, 512)
        await trio.sleep(3)
        storage.fail("write", QedfsError("cannot write: Input/output error"), forever=True)
        for cluster in (1, 2):
            assert await image.read(cluster * CLUSTER, 512) == content[:512]
            await trio.sleep(1)
            assert status(image)["error"] == "cannot write: Input/output error"
        storage.mend()
        await image.read(3 * CLUSTER, 512)
        await trio.sleep(1)
        assert status(image)["error"] is None


async def test_a_full_disk_stays_told_while_the_stream_tries_again(autojump_clock: trio.testing.MockClock) -> None:
    content = b"s" * len(ZEROS)
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(content), backing=b"http://fake/disk.raw").data)
    async with served(FakeSource(content), storage=storage) as image, trio.open_nursery() as nursery:
        await image.read(0, 512)
        await trio.sleep(3)
        storage.fail("write", NoSpace("full"), forever=True, wrote=0)
        job = StreamJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(3)
        told: list[str | None] = []
        storage.before_step = lambda: told.append(status(image)["error"])
        await trio.sleep(20)
        storage.before_step = None
        assert len(told) > 2  # a step of the overlay's file for each try of the stream, at least
        assert set(told) == {"full"}
        storage.mend()
        await trio.sleep(60)
        assert (image.complete, status(image)["condition"]) == (True, [])


async def condition(backing: bytes = b"http://fake/disk.raw") -> Condition:
    """Of an overlay that is well."""
    return Condition(await open_storage(MemoryStorage(empty(image_size=len(ZEROS), backing=backing).data)))


async def test_the_most_lasting_trouble_is_told_first() -> None:
    found = await condition()
    for cause in reversed(Cause):
        found.note(cause, QedfsError(cause))
    noted = [cause for cause in Cause if cause not in OF_OVERLAY]  # the rest is over: the overlay says so
    assert [trouble.cause for trouble in found.troubles()] == noted
    assert found.worst is not None
    assert found.worst.cause is Cause.NOT_SERVED
    assert all(trouble.ends_with for trouble in found.troubles())
    assert str(found.first(Cause.FETCH_FAILED, Cause.SOURCE_CHANGED)) == "source-changed"


async def test_the_end_of_one_trouble_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await condition()
    monkeypatch.setattr("time.time", iter([10.0, 20.0, 40.0]).__next__)
    found.note(Cause.FETCH_FAILED, SourceUnreachable("away"))
    found.note(Cause.NO_SPACE, NoSpace("full"))
    found.note(Cause.FETCH_FAILED, SourceUnreachable("still away"))  # the same trouble, in other words
    told = [(str(trouble.error), trouble.since) for trouble in found.troubles()]
    assert told == [("full", 20.0), ("still away", 10.0)]
    found.clear(Cause.FETCH_FAILED)
    found.clear(Cause.FETCH_FAILED)
    assert [trouble.cause for trouble in found.troubles()] == [Cause.NO_SPACE]
    found.note(Cause.FETCH_FAILED, SourceUnreachable("away"))
    assert [trouble.since for trouble in found.troubles()] == [20.0, 40.0]


async def test_a_complete_image_has_no_trouble_with_its_source() -> None:
    found = await condition(b"")
    for cause in Cause:
        found.note(cause, QedfsError(cause))
    assert [trouble.cause for trouble in found.troubles()] == [
        Cause.NOT_SERVED,
        Cause.REPLACED,
        Cause.INTERNAL_ERROR,
    ]


async def test_nothing_is_fetched_in_vain_after_a_commit_found_space_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The stream, slow by its limit, does not hear of the failure: the next commit is well before it looks."""
    storage = MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(ZEROS), backing=b"http://fake/disk.raw").data)
    source = FakeSource(ZEROS)
    async with served(source, storage=storage) as image, trio.open_nursery() as nursery:
        job = StreamJob(image, limit=CLUSTER // 8)
        nursery.start_soon(job.run)
        await trio.sleep(3)
        assert image.counters.kept > 0
        storage.fail("write", NoSpace("full"), wrote=0)
        await image.read(6 * CLUSTER, 512)
        await trio.sleep(2.1)
        assert image.failures == 1
        await trio.sleep(300)
        assert image.complete
        assert source.bytes_read == len(ZEROS)
