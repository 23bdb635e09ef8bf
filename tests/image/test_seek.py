"""Where data and holes of an image are: from the map alone, however large it is."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.format.tables import MISSING, ZERO
from qedfs.image.image import Image
from qedfs.image.seek import seek
from qedfs.image.standby import PassThrough
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty, filled
from tests.overlay.work import at_most
from tests.served import CLUSTER, served

CONTENT = random.Random(7).randbytes(16 * CLUSTER)
TIB = 1 << 40


async def extents(image: Image) -> list[tuple[int, int]]:
    """The data of the image, as a program finds it that copies it: (start, end)."""
    found = []
    end = 0
    while (start := await seek(image, end, hole=False)) is not None:
        stop = await seek(image, start, hole=True)
        assert stop is not None
        assert stop > start
        end = stop
        found.append((start, end))
        if end >= image.size:
            break
    return found


async def test_what_is_missing_counts_as_data_and_zero_clusters_as_holes() -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        await image.overlay.adopt_zeros(2, 3)
        await image.overlay.adopt(CLUSTER * 7, bytearray(CONTENT[7 * CLUSTER : 8 * CLUSTER]), CLUSTER)
        assert await extents(image) == [(0, 2 * CLUSTER), (5 * CLUSTER, 16 * CLUSTER)]
        assert source.reads == []


async def test_positions_inside_clusters() -> None:
    async with served(FakeSource(CONTENT)) as image:
        await image.overlay.adopt_zeros(2, 3)
        assert await seek(image, 7, hole=False) == 7
        assert await seek(image, 2 * CLUSTER + 7, hole=True) == 2 * CLUSTER + 7
        assert await seek(image, 2 * CLUSTER + 7, hole=False) == 5 * CLUSTER
        assert await seek(image, 5 * CLUSTER + 7, hole=True) == image.size
        for hole in (True, False):
            assert await seek(image, image.size, hole=hole) is None
            assert await seek(image, image.size - 1, hole=hole) == (image.size if hole else image.size - 1)


async def test_the_end_of_a_last_cluster_that_is_no_whole_one() -> None:
    async with served(FakeSource(CONTENT), image_size=3 * CLUSTER + 512) as image:
        assert await seek(image, 0, hole=True) == 3 * CLUSTER + 512
        await image.overlay.adopt_zeros(3, 1)
        assert await seek(image, 0, hole=True) == 3 * CLUSTER
        assert await seek(image, 3 * CLUSTER + 5, hole=False) is None


async def test_past_the_end_of_the_source_is_a_hole_once_its_size_is_known() -> None:
    async with served(FakeSource(CONTENT[: 3 * CLUSTER + 5]), image_size=16 * CLUSTER) as image:
        assert await extents(image) == [(0, 16 * CLUSTER)]
        await image.source_size()
        assert await extents(image) == [(0, 4 * CLUSTER)]


async def test_without_a_backing_what_is_missing_is_a_hole(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await image.read(4 * CLUSTER, CLUSTER)
        await image.overlay.detach()
        assert await extents(image) == [(4 * CLUSTER, 5 * CLUSTER)]


async def test_a_hole_that_the_source_has_told_of_is_one(autojump_clock: trio.testing.MockClock) -> None:
    """The stream passes over a whole table in a hole and gives it no entries; until then it may be data."""
    span = empty(image_size=1 << 20, cluster_size=4096).header.geometry.l2_span
    content = random.Random(1).randbytes(4096).ljust(3 * span, b"\0") + b"end"
    source = FakeSource(content)
    storage = MemoryStorage(empty(image_size=4 * span, cluster_size=4096, backing=b"http://fake/disk.raw").data)
    async with served(source, image_size=4 * span, storage=storage) as image:
        assert await extents(image) == [(0, 4 * span)]
        image.source_holes.add(1, 3)
        await image.source_size()
        assert await extents(image) == [(0, span), (3 * span, 3 * span + 4096)]
        await StreamJob(image).run()
        assert await extents(image) == [(0, 4096), (3 * span, 3 * span + 4096)]


@pytest.mark.parametrize("entry", [ZERO, MISSING])
async def test_a_tebibyte_takes_few_steps(entry: int) -> None:
    """One table of zeros in the middle of a map without tables: neither is looked at cluster by cluster."""
    built = filled(
        {(1 << 23): entry}, cluster_size=65536, table_size=4, image_size=TIB, backing=b"http://fake/disk.raw"
    )
    storage = MemoryStorage(built.data)
    async with served(FakeSource(CONTENT), image_size=TIB, storage=storage) as image:
        with at_most(300):
            if entry == ZERO:
                assert await seek(image, 0, hole=True) == (1 << 23) * 65536
            await image.source_size()
            assert await seek(image, 0, hole=True) == len(CONTENT)
            assert await seek(image, len(CONTENT), hole=False) is None


async def test_a_long_search_lets_others_run() -> None:
    """512 tables whose clusters are all zeros."""
    built = empty(cluster_size=4096, image_size=1 << 30, backing=b"http://fake/disk.raw")
    place = len(built.data)
    built.data += ZERO.to_bytes(8, "little") * 512
    for index in range(512):
        built.put_u64(built.header.l1_table_offset + 8 * index, place)
    storage = MemoryStorage(built.data)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with (
        served(FakeSource(CONTENT), image_size=1 << 30, storage=storage) as image,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(other)
        assert await seek(image, 0, hole=False) is None
        nursery.cancel_scope.cancel()
    assert turns >= 512 // 64


async def test_in_standby_all_that_is_missing_may_be_data(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(bytes(4 * CLUSTER))
    async with served(source) as image:
        await image.read(0, 512)
        image.exchange_source(None, standby=PassThrough(lambda: remote(source), lambda _: None))
        assert [await seek(image, 3 * CLUSTER, hole=hole) for hole in (False, True)] == [3 * CLUSTER, 4 * CLUSTER]
