"""What images hold together is bounded, and one that holds on to its share leaves as much to the others."""

from __future__ import annotations

import os

import pytest
import trio

from qedfs.errors import NoMemory, SourceError, SourceUnreachable
from qedfs.fetch.queue import FetchQueue
from qedfs.format.tables import ZERO
from qedfs.host import memory_pool
from qedfs.host.memory_pool import MIB, Pool, Share
from qedfs.image.image import Image
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.open import open_storage
from qedfs.source.qcow2.source import Qcow2Source
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import Built, empty
from tests.served import CLUSTER
from tests.source.qcow2.build import image as qcow2_image
from tests.source.qcow2.support import MemorySource

PAGE = 4096


def test_one_alone_gets_half_and_each_further_one_as_much_as_is_left() -> None:
    pool = Pool(1000)
    for expected in (500, 250, 125):
        share = Share(pool)
        while share.fits(1):
            share.take(1)
        assert share.held_bytes == expected


def test_who_holds_nothing_may_take_all_that_is_free() -> None:
    pool = Pool(1000)
    first, second = Share(pool), Share(pool)
    first.take(400)
    assert second.fits(600)
    assert not second.fits(601)
    first.give(400)
    assert second.fits(2000)  # nobody else holds anything
    second.take(2000)
    assert not first.fits(1)
    assert second.is_over
    second.close()
    assert first.fits(1)


@pytest.mark.parametrize("limit", [0, 100 * MIB, 1 << 30, 1 << 50])
def test_the_pools_fit_into_the_limit_beside_the_rest(limit: int) -> None:
    memory_pool.fit_into(limit)
    pools = (memory_pool.FETCHED, memory_pool.TABLES, memory_pool.PARTIAL_WRITES, memory_pool.ALONE)
    spare = max(memory_pool.LEAST_BYTES, limit - memory_pool.BASE_BYTES)
    assert sum(pool.most_bytes for pool in pools) <= spare * 5 // 6
    assert all(pool.most_bytes >= 2 * MIB for pool in pools)
    assert memory_pool.largest_cluster() >= MIB


# Tables.


def with_shared_table(tables: int, entry: int = ZERO) -> Built:
    """An overlay whose L1 entries all lead to one table of zero clusters: small, and many slices to load."""
    built = empty(cluster_size=CLUSTER, image_size=tables * 8192 * CLUSTER, backing=b"http://fake/disk.raw")
    place = len(built.data)
    built.data += entry.to_bytes(8, "little") * built.header.geometry.entries
    for index in range(tables):
        built.put_u64(built.header.l1_table_offset + 8 * index, place)
    return built


async def test_slices_of_all_overlays_together_are_bounded() -> None:
    memory_pool.TABLES.most_bytes = 4 * MIB
    data = with_shared_table(64).data
    overlays = [await open_storage(MemoryStorage(data, writable=False)) for _ in range(16)]
    most = 0
    for overlay in (*overlays, *overlays):
        for table in range(64):
            await overlay.clusters.load(table * 8192 * CLUSTER, CLUSTER)
            most = max(most, memory_pool.TABLES.used_bytes)
    assert 3 * MIB < most <= 4 * MIB + 16 * 2 * (64 << 10)
    for overlay in overlays:
        await overlay.close()
    assert memory_pool.TABLES.used_bytes == 0


async def test_what_is_remembered_of_the_slices_of_a_cut_overlay_is_bounded() -> None:
    """A count goes through all that is claimed, and a table may be claimed any number of times."""
    overlay = await open_storage(MemoryStorage(with_shared_table(64, entry=1 << 40).data, writable=False))
    await overlay.count_missing()
    assert len(overlay.tables._cut._judged._starts) == 1
    await overlay.close()


async def test_writes_all_over_a_large_image_do_not_pile_up_slices() -> None:
    memory_pool.TABLES.most_bytes = 4 * MIB
    tables = 200
    built = empty(cluster_size=4096, table_size=16, image_size=tables * 8192 * 4096, backing=b"")
    storage = MemoryStorage(built.data)
    overlay = await open_storage(storage)

    async def no_fill(_cluster: int) -> bytes:
        raise AssertionError

    for number in range(tables):
        await overlay.write(number * 8192 * 4096, b"w" * 4096, no_fill)
        assert memory_pool.TABLES.used_bytes <= 3 * MIB
    await overlay.close()
    again = await open_storage(MemoryStorage(storage.bytes))
    await again.count_missing()
    assert again.missing == tables * 8191


async def test_zeros_of_a_source_do_not_pile_up_slices(autojump_clock: trio.testing.MockClock) -> None:
    memory_pool.TABLES.most_bytes = 4 * MIB
    size = 1 << 44
    built = empty(cluster_size=MIB, table_size=16, image_size=size, backing=b"http://fake/disk.raw")
    source = FakeSource(b"x" * MIB)
    async with trio.open_nursery() as nursery:
        storage = MemoryStorage(built.data)
        image = Image("disk.raw", await open_storage(storage), FetchQueue(remote(source), MIB, nursery))
        job = StreamJob(image)
        most = 0
        nursery.start_soon(job.run)
        while job.state is not State.COMPLETE:
            most = max(most, memory_pool.TABLES.used_bytes)
            await trio.sleep(0.001)
        assert most <= 3 * MIB  # 16 of them are written
        await image.close()
        nursery.cancel_scope.cancel()


async def test_an_overlay_whose_table_finds_no_room_is_refused_and_takes_none() -> None:
    memory_pool.TABLES.most_bytes = MIB
    built = empty(cluster_size=CLUSTER, table_size=16, image_size=1 << 49)  # 64 K entries, 512 KiB
    for page in range(0, built.header.geometry.l1_used, 512):
        built.put_u64(built.header.l1_table_offset + 8 * page, built.header.l1_table_offset)
    first = await open_storage(MemoryStorage(built.data, writable=False))
    for _ in range(3):
        with pytest.raises(NoMemory, match=r"L1 table takes more than the .* of memory available for it"):
            await open_storage(MemoryStorage(built.data, writable=False))
    assert memory_pool.TABLES.used_bytes == 512 << 10
    await first.close()
    await (await open_storage(MemoryStorage(built.data, writable=False))).close()
    assert memory_pool.TABLES.used_bytes == 0


# qcow2.


async def test_the_largest_l1_of_a_qcow2_image_takes_what_is_in_it() -> None:
    entries = 1 << 20
    file = qcow2_image(
        {4096: [0] * 600 + [1024]}, l1_offset=4096, l1_size=entries, size=entries * 64 * 512, file_size=9 * MIB
    )
    source = await Qcow2Source.open(MemorySource(file), "disk")
    assert memory_pool.TABLES.used_bytes == PAGE
    await source.aclose()
    assert memory_pool.TABLES.used_bytes == 0


async def test_a_qcow2_image_whose_l1_finds_no_room_is_refused_and_takes_none() -> None:
    memory_pool.TABLES.most_bytes = 4 * MIB
    entries = 1 << 19
    tables = {4096: [1024] * entries}
    file = qcow2_image(tables, l1_offset=4096, l1_size=entries, size=entries * 64 * 512, file_size=5 * MIB)
    with pytest.raises(SourceError, match=r"L1 table takes more than the .* of memory left for it"):
        await Qcow2Source.open(MemorySource(file), "disk")
    assert memory_pool.TABLES.used_bytes == 0


# What is fetched.


async def test_many_sources_together_hold_what_one_may_and_all_come_to_an_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    memory_pool.FETCHED.most_bytes = 4 * MIB
    content = os.urandom(64) * (3 * MIB // 64)
    async with trio.open_nursery() as nursery:
        jobs: list[StreamJob] = []
        for _ in range(20):
            data = empty(cluster_size=CLUSTER, image_size=len(content), backing=b"http://fake/disk.raw").data
            fetch = FetchQueue(remote(FakeSource(content)), CLUSTER, nursery)
            jobs.append(StreamJob(Image("disk.raw", await open_storage(MemoryStorage(data)), fetch)))
            nursery.start_soon(jobs[-1].run)
        most = 0
        while any(job.state is not State.COMPLETE for job in jobs):
            most = max(most, memory_pool.FETCHED.used_bytes)
            await trio.sleep(0.001)
        assert 2 * MIB < most <= 4 * MIB
        assert memory_pool.FETCHED.used_bytes == 0
        nursery.cancel_scope.cancel()


async def test_sources_that_do_not_answer_leave_room_to_one_that_does(autojump_clock: trio.testing.MockClock) -> None:
    memory_pool.FETCHED.most_bytes = 8 * MIB
    content = os.urandom(64) * (4 * MIB // 64)
    async with trio.open_nursery() as nursery:

        async def job_over(source: FakeSource) -> StreamJob:
            data = empty(cluster_size=CLUSTER, image_size=len(content), backing=b"http://fake/disk.raw").data
            fetch = FetchQueue(remote(source), CLUSTER, nursery)
            await fetch.identity()
            job = StreamJob(Image("disk.raw", await open_storage(MemoryStorage(data)), fetch))
            nursery.start_soon(job.run)
            return job

        for _ in range(5):
            dead = FakeSource(content)
            dead.gate = trio.Event()
            await job_over(dead)
        await trio.sleep(1)
        held = memory_pool.FETCHED.used_bytes
        assert held > 5 * MIB
        job = await job_over(FakeSource(content))
        while job.state is not State.COMPLETE:
            await trio.sleep(0.01)
            assert memory_pool.FETCHED.used_bytes <= 8 * MIB
        assert memory_pool.FETCHED.used_bytes <= held + MIB
        nursery.cancel_scope.cancel()


async def test_readers_who_are_served_alone_are_bounded_together(autojump_clock: trio.testing.MockClock) -> None:
    """Of clusters so large that none is fetched for them. A source that does not answer leaves room to the others."""
    memory_pool.ALONE.most_bytes = 4 * MIB
    content = os.urandom(64) * (16 * MIB // 64)
    async with trio.open_nursery() as nursery:

        async def image_over(source: FakeSource) -> Image:
            data = empty(cluster_size=8 * MIB, image_size=len(content), backing=b"http://fake/disk.raw").data
            fetch = FetchQueue(remote(source), 8 * MIB, nursery)
            await fetch.identity()
            return Image("disk.raw", await open_storage(MemoryStorage(data)), fetch)

        dead_source = FakeSource(content)
        dead, well = await image_over(dead_source), await image_over(FakeSource(content))
        await dead.source_size()
        dead_source.gate = trio.Event()
        for number in range(30):
            nursery.start_soon(_read_in_vain, dead, number * (MIB // 2))
        await trio.testing.wait_all_tasks_blocked()
        assert memory_pool.ALONE.used_bytes == 2 * MIB
        for number in range(8):
            assert await well.read(number * MIB, MIB) == content[number * MIB :][:MIB]
        await trio.sleep(60)
        assert memory_pool.ALONE.used_bytes == 0
        nursery.cancel_scope.cancel()


async def _read_in_vain(image: Image, pos: int) -> None:
    with pytest.raises(SourceUnreachable):
        await image.read(pos, MIB // 2)


# Writes in part.


async def test_writes_in_part_to_many_images_are_bounded_together(autojump_clock: trio.testing.MockClock) -> None:
    memory_pool.PARTIAL_WRITES.most_bytes = 4 * MIB
    content = b"s" * (4 * MIB)
    async with trio.open_nursery() as nursery:
        images: list[Image] = []
        for _ in range(8):
            source = FakeSource(content)
            data = empty(cluster_size=MIB // 2, image_size=len(content), backing=b"http://fake/disk.raw").data
            images.append(
                Image(
                    "disk.raw", await open_storage(MemoryStorage(data)), FetchQueue(remote(source), MIB // 2, nursery)
                )
            )
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, memory_pool.PARTIAL_WRITES.used_bytes)
                await trio.sleep(0.001)

        nursery.start_soon(watch)
        async with trio.open_nursery() as writers:
            for image in images:
                for number in range(8):
                    writers.start_soon(image.write, number * (MIB // 2) + 512, b"w" * 512)
        assert 2 * MIB <= most <= 4 * MIB
        assert memory_pool.PARTIAL_WRITES.used_bytes == 0
        for image in images:
            assert await image.read(0, 2048) == b"s" * 512 + b"w" * 512 + b"s" * 1024
            await image.close()
        nursery.cancel_scope.cancel()
