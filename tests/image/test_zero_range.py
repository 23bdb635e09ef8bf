"""Ranges that have to read as zeros: whole clusters cost no fetch, parts of clusters are written."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.format.tables import ZERO
from qedfs.image.zero_range import make_zeros
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = random.Random(7).randbytes(8 * CLUSTER + 1024)
SIZE = len(CONTENT)


@pytest.mark.parametrize("pos", [0, 1, CLUSTER - 1, CLUSTER, 3 * CLUSTER + 512, 8 * CLUSTER, SIZE - 5, SIZE, SIZE + 7])
@pytest.mark.parametrize("size", [1, 512, CLUSTER, 2 * CLUSTER + 2, SIZE])
async def test_the_range_and_nothing_else_reads_as_zeros(
    pos: int, size: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await image.read(2 * CLUSTER, CLUSTER)
        await make_zeros(image, pos, size)
        expected = bytearray(CONTENT)
        expected[pos : pos + size] = bytes(len(expected[pos : pos + size]))
        assert bytes(await image.read(0, SIZE)) == expected


async def test_whole_clusters_are_not_fetched_and_parts_of_missing_ones_are(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        await make_zeros(image, CLUSTER, 3 * CLUSTER)
        await make_zeros(image, 7 * CLUSTER, SIZE)  # the last cluster ends with the image
        assert source.reads == []
        assert image.counters.discarded == 5 * CLUSTER
        await make_zeros(image, 5 * CLUSTER - 10, 20)
        assert sorted(source.reads) == [(4 * CLUSTER, CLUSTER, True), (5 * CLUSTER, CLUSTER, True)]
        await StreamJob(image).run()
        assert sum(size for _, size, _ in source.reads) == 4 * CLUSTER


async def test_a_part_of_a_zero_cluster_takes_no_space(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await make_zeros(image, 0, 2 * CLUSTER)
        await make_zeros(image, 100, CLUSTER)
        assert [run.offset for run in await image.overlay.map(0, 2 * CLUSTER)] == [ZERO]


async def test_a_cluster_that_is_discarded_while_it_is_fetched_stays_so(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image, trio.open_nursery() as nursery:
        nursery.start_soon(image.read, 0, 512)
        await trio.testing.wait_all_tasks_blocked()
        await make_zeros(image, 0, CLUSTER)
        await trio.sleep(5)
        assert bytes(await image.read(0, 512)) == bytes(512)


async def test_a_partial_write_that_waits_for_the_rest_gets_zeros(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.write, 100, b"guest")
            await trio.testing.wait_all_tasks_blocked()
            await make_zeros(image, 0, CLUSTER)
        assert bytes(await image.read(0, CLUSTER)) == b"guest".rjust(105, b"\0").ljust(CLUSTER, b"\0")


async def test_a_read_that_waits_for_the_source_sees_no_bytes_of_another_cluster(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its first cluster is discarded meanwhile, and another one takes the place."""
    async with served(FakeSource(CONTENT)) as image:
        await image.write(0, b"w" * CLUSTER)
        found = b""

        async def read() -> None:
            nonlocal found
            found = bytes(await image.read(0, 2 * CLUSTER))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            (before,) = await image.overlay.map(0, CLUSTER)
            await make_zeros(image, 0, CLUSTER)
            await image.flush()
            await image.overlay.give_space_back()
            await image.write(5 * CLUSTER, b"o" * CLUSTER)
            (other,) = await image.overlay.map(5 * CLUSTER, CLUSTER)
            assert other.offset == before.offset
            assert found == b""
        assert found == bytes(CLUSTER) + CONTENT[CLUSTER : 2 * CLUSTER]
