"""The commit job: its pace, its stops, and its end."""

from __future__ import annotations

import errno
import random
from functools import partial

import pytest
import trio
import trio.testing

from qedfs.errors import InUse, NoSpace, QedfsError
from qedfs.format.tables import MISSING
from qedfs.image.commit_target import RawTarget
from qedfs.image.image import Image
from qedfs.jobs.commit import CommitJob
from qedfs.jobs.state import ENDED, State
from tests.image.commits import CLUSTER, DATA, SIZE, ZEROS, Two, disk_of, runs_of, started, started_over_qed, wanted
from tests.image.live import Fails, image_of


async def offsets(image: Image) -> set[int]:
    return {min(run.offset, MISSING + 1) for run in await runs_of(image.overlay)}


async def test_it_ends_with_an_empty_overlay(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image:
        job = CommitJob(image)
        assert (job.progress, job.total) == (0, SIZE)
        await job.run(once=True)
        assert (job.state, job.progress) == (State.COMPLETE, SIZE)
        assert (job.copied_bytes, job.dropped_bytes) == (DATA + ZEROS, DATA + ZEROS)
        assert await offsets(image) == {MISSING}
        assert not image.committing_down
        again = CommitJob(image)
        await again.run(once=True)
        assert (again.state, again.copied_bytes) == (State.COMPLETE, 0)
    assert bytes(two.backing.bytes) == wanted()


async def test_it_may_keep_clusters(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image:
        job = CommitJob(image)
        job.keep = True
        await job.run(once=True)
        assert (job.state, job.progress, job.dropped_bytes) == (State.COMPLETE, SIZE, 0)
        assert await offsets(image) != {MISSING}


async def test_it_keeps_to_its_limit_stops_when_it_is_told_to_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image, trio.open_nursery() as nursery:
        job = CommitJob(image, limit=CLUSTER)
        nursery.start_soon(job.run)
        await trio.sleep(2)
        await job.pause()
        await trio.sleep(2)
        copied = job.copied_bytes
        assert CLUSTER <= copied <= 4 * CLUSTER
        await trio.sleep(100)
        assert (job.state, job.copied_bytes) == (State.PAUSED, copied)
        assert bytes(await image.read(0, SIZE)) == wanted()
        job.set_limit(0)
        await job.resume()
        with trio.fail_after(1000):
            while job.state not in ENDED:  # noqa: ASYNC110
                await trio.sleep(1)
        assert job.copied_bytes == DATA + ZEROS  # nothing twice
        assert await offsets(image) == {MISSING}


async def test_it_waits_for_room(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    two = Two(await started())
    two.backing.fail("write", NoSpace("full"), nth=2)
    async with image_of(two, monkeypatch) as image:
        job = CommitJob(image)
        await job.run(once=True)
        assert job.state is State.COMPLETE
    assert bytes(two.backing.bytes) == wanted()


@pytest.mark.expect_log("the commit has stopped: cannot sync")
async def test_what_the_disk_did_not_take_is_copied_again(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two = Two(await started())
    lost: list[bool] = []
    two.backing.lose_at(1, random.Random(1), lambda: lost.append(True))
    async with image_of(two, monkeypatch) as image, trio.open_nursery() as nursery:
        job = CommitJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(1)
        assert (lost, job.state) == ([True], State.FAILED)
        job.start()
        await trio.sleep(10)
        assert job.state is State.COMPLETE
        assert await offsets(image) == {MISSING}
    two.backing.refresh()  # without what only the page cache has
    assert bytes(two.backing.bytes) == wanted()


@pytest.mark.expect_log("the commit has stopped", "the commit begins anew", "disk.raw: its backing")
async def test_a_qed_session_whose_barrier_has_failed_gives_way_to_another_one(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two = await started_over_qed()
    async with image_of(two, monkeypatch) as image, trio.open_nursery() as nursery:
        job = CommitJob(image)
        two.backing.fail("barrier", QedfsError("the disk is broken"), nth=6)
        nursery.start_soon(job.run)
        await trio.sleep(1)
        assert (job.state, job.copied_bytes > 0) == (State.FAILED, True)
        assert bytes(await image.read(0, SIZE)) == wanted()
        job.start()
        await trio.sleep(10)
        assert job.state is State.COMPLETE
        assert await offsets(image) == {MISSING}
    assert await disk_of(bytes(two.backing.bytes)) == wanted()


@pytest.mark.expect_log("the commit has stopped", "cannot be opened again", "begins anew", "disk.raw: its backing:")
@pytest.mark.parametrize("kind", ["raw", "qed"])
async def test_if_no_other_source_can_be_had_the_doubt_about_the_disk_stays(
    kind: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two = await started_over_qed() if kind == "qed" else Two(await started())
    async with image_of(two, monkeypatch) as image, trio.open_nursery() as nursery:
        assert image.own_backing is not None
        fetch = Fails(image.own_backing.fetch, OSError(errno.EMFILE, "Too many open files"))
        monkeypatch.setattr(image.own_backing, "fetch", fetch)
        if kind == "qed":
            two.backing.fail("barrier", QedfsError("the disk is broken"), nth=6)
        else:
            two.backing.lose_at(1, random.Random(1), lambda: None)
        job = CommitJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(1)
        assert (job.state, fetch.failed) == (State.FAILED, False)
        if kind == "raw":
            two.backing.fail("refresh", InUse("another program keeps pages"))
        job.start()
        await trio.sleep(10)
        assert (job.state, fetch.failed) == (State.FAILED, True)
        job.start()
        await trio.sleep(10)
        assert job.state is State.COMPLETE
        assert await offsets(image) == {MISSING}
        if kind == "raw":
            two.backing.refresh()  # without what only the page cache has
    backing = bytes(two.backing.bytes)
    assert (await disk_of(backing) if kind == "qed" else backing) == wanted()


async def test_a_cancelled_one_gives_the_source_back(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image, trio.open_nursery() as nursery:
        job = CommitJob(image, limit=CLUSTER)

        async def run() -> None:
            await job.run(once=True)

        nursery.start_soon(run)
        await trio.sleep(2)
        assert (image.committing_down, image.copy_on_read) == (True, False)
        held = image.source
        job.cancel()
        await trio.sleep(2)
        assert image.source is not held
        assert (image.committing_down, image.copy_on_read, job.state) == (False, True, State.OFF)
        assert bytes(await image.read(0, SIZE)) == wanted()


@pytest.mark.expect_log("the commit waits: the file system of the backing")
async def test_it_tells_that_the_backing_does_not_answer_also_when_it_has_been_told_to_end(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two, thawed = Two(await started()), trio.Event()
    store = RawTarget.store

    async def frozen(target: RawTarget, pos: int, view: memoryview) -> int:
        with trio.CancelScope(shield=True):  # as a call in a thread
            await thawed.wait()
        return await store(target, pos, view)

    monkeypatch.setattr(RawTarget, "store", frozen)
    async with image_of(two, monkeypatch) as image, trio.open_nursery() as nursery:
        job = CommitJob(image)
        nursery.start_soon(partial(job.run, once=True))
        await trio.sleep(2)
        assert (job.state, job.reason) == (State.RUNNING, "")
        await trio.sleep(10)
        waits = "the file system of the backing /base.raw does not answer: is it frozen?"
        assert (job.state, job.reason) == (State.WAITING, waits)
        job.cancel()
        await trio.sleep(10)
        assert (job.state, job.reason) == (State.WAITING, waits)
        thawed.set()
        await trio.sleep(1)
        assert (job.state, job.reason) == (State.OFF, "")
        again = CommitJob(image)
        await again.run(once=True)
        assert again.state is State.COMPLETE
    assert bytes(two.backing.bytes) == wanted()
