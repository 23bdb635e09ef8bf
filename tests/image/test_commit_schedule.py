"""When an image commits on its own, and what a commit that fails leaves."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import trio

from qedfs.errors import NoSpace, QedfsError
from qedfs.image.image import Image
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

CONTENT = random.Random(7).randbytes(40 * CLUSTER)


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data)


async def adopt(image: Image, cluster: int) -> None:
    """Adopt one cluster, without a commit."""
    pos = cluster * CLUSTER
    await image.overlay.adopt(pos, bytearray(CONTENT[pos : pos + CLUSTER]), CLUSTER)


def uncommitted(image: Image) -> bool:
    """A call: mypy takes an attribute that it saw compared for unchanged, also over an `await`."""
    return image.overlay.commit_pending


async def test_a_write_begins_a_commit_if_enough_is_new(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.image.commit_schedule.COMMIT_BYTES", 4 * CLUSTER)
    built = empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw")
    async with served(FakeSource(CONTENT)) as other:
        # With a journal: without one, each write commits.
        overlay = await open_storage(MemoryStorage(built.data, name="disk"), journal_folder=tmp_path)
        image = Image("disk.raw", overlay, other.fetch)
        await image.write(0, bytes(3 * CLUSTER))
        await trio.testing.wait_all_tasks_blocked()
        assert uncommitted(image)
        await image.write(3 * CLUSTER, bytes(CLUSTER))
        while uncommitted(image):
            await trio.lowlevel.checkpoint()
        await image.close()


async def test_an_adoption_waits_for_a_commit_if_too_much_is_uncommitted(
    storage: MemoryStorage, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.image.commit_schedule.MOST_UNCOMMITTED_BYTES", 2 * CLUSTER)
    async with served(FakeSource(CONTENT), storage=storage) as image:
        await image.consumer.take(0, bytearray(CONTENT[:CLUSTER]), CLUSTER, asked=True)
        assert uncommitted(image)
        await image.consumer.take(CLUSTER, bytearray(CONTENT[CLUSTER : 2 * CLUSTER]), CLUSTER, asked=True)
        assert not uncommitted(image)


async def test_a_commit_that_fails_is_counted_each_time_and_logged_once(
    storage: MemoryStorage, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(FakeSource(CONTENT), storage=storage) as image:
        await adopt(image, 0)
        storage.fail("write", QedfsError("EIO"), forever=True)
        for _ in range(3):
            await image.commits.commit()
        assert (image.failures, caplog.text.count("EIO")) == (3, 1)
        storage.mend()
        await image.commits.commit()
        assert not uncommitted(image)
        await adopt(image, 1)
        storage.fail("write", QedfsError("EIO"), forever=True)
        await image.commits.commit()
        assert (image.failures, caplog.text.count("EIO")) == (4, 2)
        storage.mend()


async def test_a_commit_without_space_stops_adoptions_for_a_while(
    storage: MemoryStorage, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    async with served(FakeSource(CONTENT), storage=storage) as image:
        await adopt(image, 0)
        storage.fail("write", NoSpace("full"), forever=True)
        await image.commits.commit()
        storage.mend()
        await image.consumer.take(CLUSTER, bytearray(CONTENT[:CLUSTER]), CLUSTER, asked=True)
        assert image.counters.kept == 0
        await image.commits.commit()
        await image.consumer.take(CLUSTER, bytearray(CONTENT[:CLUSTER]), CLUSTER, asked=True)
        assert (image.counters.kept, caplog.text) == (CLUSTER, "")
