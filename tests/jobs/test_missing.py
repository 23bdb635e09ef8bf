"""What a stream finds missing: holes cost what they are, and a walk over many of them stops nobody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio

from qedfs.format.tables import ZERO
from qedfs.image.zero_range import make_zeros
from qedfs.jobs.missing import MissingRuns
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.source.base import Extent
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import Built, empty
from tests.served import CLUSTER, served

MIB = 1 << 20


async def turns_of_others(walk: Callable[[], Awaitable[object]]) -> int:
    """How many turns another task has while we walk."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        await walk()
        nursery.cancel_scope.cancel()
    return turns


def with_tables(built: Built, indices: range, entry: int = ZERO) -> MemoryStorage:
    """A file whose L1 entries of these indices all lead to one table with this entry for every cluster."""
    place = len(built.data)
    built.data += entry.to_bytes(8, "little") * built.header.geometry.entries
    for index in indices:
        built.put_u64(built.header.l1_table_offset + 8 * index, place)
    return MemoryStorage(built.data)


async def test_a_hole_of_two_million_tables_is_passed_over_at_once() -> None:
    # The most L1 entries that a legal overlay can have: 17 MiB of file, most of them hole.
    size = 1 << 62
    built = empty(cluster_size=MIB, table_size=16, image_size=size, backing=b"http://fake/disk.raw")
    assert built.header.geometry.l1_used == 1 << 21
    source = FakeSource(b"x" * 4096, round_trip=0)
    async with served(source, image_size=size, storage=MemoryStorage(built.data)) as image:
        job = StreamJob(image)
        # Step by step it takes 65536 turns, 9 s, and 120 MiB for the numbers.
        assert 10 < await turns_of_others(job.run) < 5000
        assert (job.state, job.progress) == (State.COMPLETE, size)


async def test_tables_without_number_between_holes_stop_nobody() -> None:
    built = empty(image_size=512 * 2 * MIB, cluster_size=4096, backing=b"http://fake/disk.raw")
    assert built.header.geometry.l2_span == 2 * MIB
    storage = with_tables(built, range(1, 512, 2))
    async with served(FakeSource(b""), image_size=512 * 2 * MIB, storage=storage) as image:
        missing = MissingRuns(image)

        async def walk() -> None:
            assert await missing.next_run(0, 0) is None
            assert await missing.first_from(0) is None

        assert await turns_of_others(walk) > 10
        assert missing.skipped == image.size // 2


async def test_full_tables_without_number_stop_nobody() -> None:
    built = empty(image_size=512 * 2 * MIB, cluster_size=4096, backing=b"http://fake/disk.raw")
    async with served(FakeSource(b""), image_size=512 * 2 * MIB, storage=with_tables(built, range(512))) as image:
        missing = MissingRuns(image)
        assert await turns_of_others(lambda: missing.first_from(0)) > 5


async def test_what_two_walks_pass_over_counts_once() -> None:
    # 4 KiB clusters: a table spans 2 MiB. The last one is not whole.
    size = 9 * 2 * MIB + CLUSTER
    built = empty(image_size=size, cluster_size=4096, backing=b"http://fake/disk.raw")
    async with served(FakeSource(b"x" * 4096), image_size=size, storage=MemoryStorage(built.data)) as image:
        missing = MissingRuns(image)
        assert await missing.next_run(5 * 512, 4096) is None
        assert missing.skipped == size - 5 * 2 * MIB
        assert await missing.first_from(5 * 2 * MIB) is None
        assert await missing.next_run(0, 4096) == (0, 1)
        assert await missing.next_run(1, 4096) is None
        assert missing.skipped == size - 2 * MIB
        assert await missing.first_from(7) == 7
        assert image.populated == 2 * MIB - 4096


class Fragmented(FakeSource):
    """Tells of every second cluster that it is a hole, however many it is asked about."""

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        clusters = range(pos // CLUSTER, (pos + size) // CLUSTER)
        return [Extent(number * CLUSTER, CLUSTER, zero=number % 2 == 1) for number in clusters]


async def test_what_a_source_tells_of_its_holes_is_kept_in_part_only(autojump_clock: trio.testing.MockClock) -> None:
    content = (b"x" * CLUSTER + bytes(CLUSTER)) * 1000
    async with served(source := Fragmented(content)) as image:
        job = StreamJob(image)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qedfs.jobs.missing.MOST_EXTENTS", 100)
            await job._missing.next_run(0, len(content))
            assert len(job._missing._extents) <= 100
            await job.run()
        assert source.bytes_read == len(content) // 2
        assert await image.read(0, 2 * CLUSTER) == content[: 2 * CLUSTER]


async def test_progress_does_not_count_a_discarded_hole_twice() -> None:
    # 4 KiB clusters: a table spans 2 MiB. The source has data at both ends and a hole of 6 tables between.
    size = 8 * 2 * MIB
    built = empty(image_size=size, cluster_size=4096, backing=b"http://fake/disk.raw")
    source = FakeSource(bytes(range(1, 256)) * 4112 * 16 + b"x" * (size - 255 * 4112 * 16), round_trip=0)
    source.holes = [(2 * MIB, 12 * MIB)]
    async with served(source, image_size=size, storage=MemoryStorage(built.data)) as image:
        job = StreamJob(image, enabled=False)
        assert await job._missing.next_run(512, len(source.content)) is not None
        assert job.progress == 12 * MIB
        moved = job.moved
        await make_zeros(image, 0, 14 * MIB)
        assert job.progress == 14 * MIB
        assert job.moved == moved  # nothing was fetched, so the rate stays as it was
        assert image.counters.discarded == 2 * MIB
