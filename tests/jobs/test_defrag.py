"""The defragmentation job: what it moves, how fast, and how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
import trio.testing

from qedfs.errors import BadOverlay, NoSpace
from qedfs.image.image import Image
from qedfs.jobs.defrag import GUEST_SECONDS, STILL_SECONDS, STRETCH_BYTES, DefragJob, Disorder, disorder
from qedfs.jobs.state import ENDED, State
from qedfs.overlay.fragments import Fragments, fragments
from qedfs.overlay.relocation import PIECE_BYTES
from qedfs.overlay.storage import Buffer
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.served import CLUSTER, served

STRETCH = STRETCH_BYTES // CLUSTER


@contextlib.asynccontextmanager
async def scattered(clusters: int) -> AsyncIterator[Image]:
    """An image that was written backwards, each cluster full of its own byte."""
    async with served(FakeSource(b""), image_size=(clusters + 2) * CLUSTER) as image:
        for cluster in reversed(range(clusters)):
            await image.write(cluster * CLUSTER, bytes([1 + cluster % 255]) * CLUSTER)
        await image.flush()
        yield image


async def layout(image: Image) -> Fragments:
    return await fragments(image.overlay.tables, image.overlay.clusters)


async def is_right(image: Image, clusters: int) -> bool:
    for cluster in range(clusters):
        if await image.read(cluster * CLUSTER, CLUSTER) != bytes([1 + cluster % 255]) * CLUSTER:
            return False
    return True


def storage_of(image: Image) -> MemoryStorage:
    assert isinstance(image.overlay.storage, MemoryStorage)
    return image.overlay.storage


async def test_the_image_is_in_order_afterwards_and_the_file_no_longer(autojump_clock: trio.testing.MockClock) -> None:
    clusters = STRETCH + 20
    async with scattered(clusters) as image:
        size = image.overlay.file_size
        assert (await layout(image)).pieces == clusters
        assert await disorder(image.overlay) == Disorder(clusters * CLUSTER, clusters, CLUSTER, clusters * CLUSTER)
        job = DefragJob(image)
        await job.run()
        assert (job.state, job.progress, job.total) == (State.COMPLETE, image.size, image.size)
        assert (await layout(image)).pieces == 1
        assert await disorder(image.overlay) == Disorder(clusters * CLUSTER, 1, clusters * CLUSTER, 0)
        assert image.overlay.file_size == size
        assert await is_right(image, clusters)
        # Once more: nothing is moved.
        again = DefragJob(image)
        await again.run()
        assert (again.state, again.moved_bytes) == (State.COMPLETE, 0)


async def test_what_an_earlier_one_has_left_at_the_end_of_the_file_goes_down(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scattered(20) as image:
        size = image.overlay.file_size
        gathering = await image.overlay.relocation.gather(0, 20)
        assert gathering is not None
        with gathering:
            while not gathering.ended:
                await gathering.step()
        await image.overlay.commit_and_give_back()
        assert (await layout(image)).pieces == 1
        assert image.overlay.file_size == size + 20 * CLUSTER
        job = DefragJob(image)
        await job.run()
        assert (image.overlay.file_size, job.moved_bytes) == (size, 20 * CLUSTER)
        assert await is_right(image, 20)


async def test_old_places_are_punched_in_long_rows(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(40) as image:
        await DefragJob(image).run()
        assert storage_of(image).operations["punch"] <= 3
        assert not image.overlay.relocation.put_off_bytes
        assert not image.overlay.has_space_to_give_back


async def test_when_it_is_cancelled_old_places_are_punched(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(40) as image, trio.open_nursery() as nursery:
        job = DefragJob(image, limit=4 * CLUSTER)
        nursery.start_soon(lambda: job.run(once=True))
        await trio.sleep(3)
        await image.tend()
        assert image.overlay.relocation.put_off_bytes
        assert storage_of(image).operations["punch"] == 0
        job.cancel()
        await trio.sleep(1)
        await image.tend()
        assert not image.overlay.relocation.put_off_bytes
        assert storage_of(image).operations["punch"] > 0


async def test_on_a_full_disk_it_goes_on_with_the_room_of_old_places(autojump_clock: trio.testing.MockClock) -> None:
    clusters = 2 * STRETCH
    async with scattered(clusters) as image, trio.open_nursery() as nursery:
        job = DefragJob(image, limit=STRETCH_BYTES)
        nursery.start_soon(job.run)
        await trio.sleep(0.8)
        await image.tend()
        assert image.overlay.relocation.put_off_bytes
        storage_of(image).fail("write", NoSpace("the file system is full"))
        with trio.fail_after(1000):
            while job.state not in ENDED:  # noqa: ASYNC110
                await trio.sleep(1)
        assert (job.state, job.error) == (State.COMPLETE, None)
        assert (await layout(image)).pieces <= 2
        assert await is_right(image, clusters)


async def test_with_a_quota_smaller_than_a_stretch_it_comes_to_its_end(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system tells of much free space, and punches make room for a few clusters each time."""
    async with scattered(STRETCH) as image, trio.open_nursery() as nursery:
        storage, write = storage_of(image), storage_of(image).write
        blocks = set(range(storage.size() // CLUSTER))
        most = len(blocks) + STRETCH // 2

        def written(offset: int, data: Sequence[Buffer]) -> None:
            new = set(range(offset // CLUSTER, -(-(offset + sum(map(len, data))) // CLUSTER))) - blocks
            if len(blocks) + len(new) > most:
                raise NoSpace("the quota is exceeded")
            blocks.update(new)
            write(offset, data)

        def punched(offset: int, size: int) -> bool:
            blocks.difference_update(range(offset // CLUSTER, (offset + size) // CLUSTER))
            return True

        monkeypatch.setattr(storage, "write", written)
        monkeypatch.setattr(storage, "punch", punched)
        job = DefragJob(image, limit=16 * CLUSTER)
        nursery.start_soon(lambda: job.run(once=True))
        with trio.fail_after(200):
            while job.state not in ENDED:
                await trio.sleep(1)
                await image.tend()
        assert (job.state, (await layout(image)).pieces) == (State.COMPLETE, 1)
        assert not image.overlay.relocation.put_off_bytes
        assert await is_right(image, STRETCH)


async def test_outside_its_hours_old_places_are_punched(autojump_clock: trio.testing.MockClock) -> None:
    reason = ""
    async with scattered(40) as image, trio.open_nursery() as nursery:
        nursery.start_soon(DefragJob(image, limit=4 * CLUSTER, hold_off=lambda: reason).run)
        await trio.sleep(3)
        reason = "outside its hours"
        await trio.sleep(STILL_SECONDS / 2)
        await image.tend()
        assert image.overlay.relocation.put_off_bytes
        await trio.sleep(STILL_SECONDS)
        await image.tend()
        assert not image.overlay.relocation.put_off_bytes
        nursery.cancel_scope.cancel()


async def test_it_stops_when_it_is_told_to_and_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(20) as image, trio.open_nursery() as nursery:
        job = DefragJob(image, limit=4 * CLUSTER)
        nursery.start_soon(job.run)
        await trio.sleep(2)
        await job.pause()
        await trio.sleep(1)
        moved = job.moved_bytes
        assert 4 * CLUSTER <= moved <= 12 * CLUSTER
        await trio.sleep(100)
        assert (job.state, job.moved_bytes) == (State.PAUSED, moved)
        job.set_limit(0)
        await job.resume()
        with trio.fail_after(1000):
            while job.state not in ENDED:  # noqa: ASYNC110
                await trio.sleep(1)
        assert (await layout(image)).pieces == 1
        assert await is_right(image, 20)
        assert job.moved_bytes == 2 * 20 * CLUSTER  # to the end of the file and back, nothing twice


async def test_it_can_be_cancelled_while_the_file_system_is_frozen(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(4) as image, trio.open_nursery() as nursery:
        storage_of(image).frozen = True
        job = DefragJob(image)
        nursery.start_soon(lambda: job.run(once=True))
        await trio.sleep(10)
        assert (job.state, job.moved_bytes) == (State.RUNNING, 0)
        job.cancel()
        with trio.fail_after(10):
            while job.state is not State.OFF:  # noqa: ASYNC110
                await trio.sleep(1)
        assert storage_of(image).frozen


async def test_it_holds_off(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(4) as image, trio.open_nursery() as nursery:
        job = DefragJob(image, hold_off=lambda: "busy")
        nursery.start_soon(job.run)
        await trio.sleep(10)
        assert (job.state, job.reason, job.moved_bytes) == (State.WAITING, "busy", 0)
        nursery.cancel_scope.cancel()


async def test_while_a_guest_is_active_it_moves_one_piece_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(40) as image, trio.open_nursery() as nursery:
        job = DefragJob(image)

        async def guest() -> None:
            while True:
                await image.read(50 * CLUSTER, 1)
                image.counters.read += 1
                await trio.sleep(GUEST_SECONDS / 4)

        nursery.start_soon(guest)
        nursery.start_soon(job.run)
        await trio.sleep(5.5 * GUEST_SECONDS)
        assert PIECE_BYTES <= job.moved_bytes <= 6 * PIECE_BYTES
        nursery.cancel_scope.cancel()


async def test_a_guest_that_writes_meanwhile_wins(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(20) as image, trio.open_nursery() as nursery:
        job = DefragJob(image, limit=8 * CLUSTER)
        nursery.start_soon(job.run)
        expected = [bytes([1 + cluster]) * CLUSTER for cluster in range(20)]
        for number in range(60):
            await trio.sleep(0.05)
            cluster = number * 7 % 20
            expected[cluster] = bytes([100 + number]) * CLUSTER
            await image.write(cluster * CLUSTER, expected[cluster])
        with trio.fail_after(1000):
            while job.state not in ENDED:  # noqa: ASYNC110
                await trio.sleep(1)
        assert [bytes(await image.read(cluster * CLUSTER, CLUSTER)) for cluster in range(20)] == expected
        assert (await layout(image)).pieces == 1


@pytest.mark.expect_log("the defrag has stopped")
async def test_a_full_disk_ends_it_with_the_room_that_it_needs(autojump_clock: trio.testing.MockClock) -> None:
    async with scattered(20) as image:
        storage_of(image).fail("write", NoSpace("the file system is full"), nth=3)
        job = DefragJob(image)
        await job.run(once=True)
        assert job.state is State.FAILED
        assert "is full; what is in order stays so, and the rest needs 128 MiB of free space" in str(job.error)
        assert await is_right(image, 20)
        job.start()
        await job.run(once=True)
        assert (await layout(image)).pieces <= 2


async def test_a_damaged_overlay_is_refused(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scattered(4) as image:
        monkeypatch.setattr(image.overlay._freed.references, "problem", "two entries point to the cluster at 0x1000")
        with pytest.raises(BadOverlay, match=r"two entries point .*; run qedfs check"):
            await DefragJob(image).work()
        assert (await layout(image)).pieces == 4
