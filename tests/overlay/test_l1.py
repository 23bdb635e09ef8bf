"""The L1 table in memory: entry by entry as a plain array would have it, and no larger than what is in it."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfs.format.sparse import PAGE_ENTRIES, SparseTable
from qedfs.host.memory_pool import Pool, Share
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.overlay.l1 import read_l1
from qedfs.overlay.open import open_storage
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import Built, empty
from tests.served import served

MIB = 1 << 20
LENGTH = 5 * PAGE_ENTRIES + 7
SIZE = 1 << 62


def claiming(backing: bytes) -> Built:
    """An overlay whose L1 has 2^21 entries, the most that can be; none of them is set."""
    return empty(cluster_size=MIB, table_size=16, image_size=SIZE, backing=backing)


def plain(table: SparseTable) -> list[int]:
    return [table[index] for index in range(len(table))]


@given(st.dictionaries(st.integers(0, LENGTH - 1), st.integers(1, (1 << 64) - 1), max_size=20))
def test_a_table_holds_what_was_set_and_finds_it(entries: dict[int, int]) -> None:
    table, expected = SparseTable(LENGTH), [0] * LENGTH
    for index, entry in entries.items():
        table[index] = expected[index] = entry
    assert plain(table) == expected
    for first in (0, 1, PAGE_ENTRIES - 1, PAGE_ENTRIES, LENGTH - 1, *entries):
        found = next((index for index in range(first, LENGTH) if expected[index]), LENGTH)
        assert table.next_filled(first, LENGTH) == found
        seen = table.next_filled(first, 3)
        assert seen <= found
        assert seen > first or expected[first]
        part = table.part(first - first % 64, 64)
        assert part == array("Q", expected[first - first % 64 :][:64])
    assert table.held_bytes == 4096 * len({index // PAGE_ENTRIES for index in entries})


@given(st.dictionaries(st.integers(0, LENGTH - 1), st.integers(1, (1 << 64) - 1), max_size=20))
def test_a_table_is_read_whole_whatever_holes_the_file_has(entries: dict[int, int]) -> None:
    data = bytearray(8192 + 8 * LENGTH)
    for index, entry in entries.items():
        data[8192 + 8 * index : 8192 + 8 * index + 8] = entry.to_bytes(8, "little")
    table = read_l1(MemoryStorage(data), 8192, LENGTH, Share(Pool(1 << 20)))
    assert plain(table) == [entries.get(index, 0) for index in range(LENGTH)]


@pytest.mark.parametrize("place", [4096, 4096 + 512, 100])
def test_a_table_may_begin_anywhere_in_a_hole(place: int) -> None:
    data = bytearray(place + 8 * LENGTH)
    data[place + 8 * 1030 : place + 8 * 1031] = b"\7" * 8
    table = read_l1(MemoryStorage(data), place, LENGTH, Share(Pool(1 << 20)))
    assert table.next_filled(0, LENGTH) == 1030
    assert table[1030] == 0x0707070707070707


async def test_overlays_that_claim_the_largest_table_take_what_is_in_them() -> None:
    built = claiming(b"base.raw")
    storages = [MemoryStorage(built.data) for _ in range(10)]
    await open_storage(MemoryStorage(built.data))  # what is made once
    tracemalloc.start()
    try:
        overlays = [await open_storage(storage) for storage in storages]
        assert tracemalloc.get_traced_memory()[0] < len(overlays) * (128 << 10)
    finally:
        tracemalloc.stop()


async def test_a_stream_over_the_largest_table_takes_what_is_in_it(autojump_clock: trio.testing.MockClock) -> None:
    built = claiming(b"http://fake/disk.raw")
    source = FakeSource(b"", round_trip=0)
    async with served(source, image_size=SIZE, storage=MemoryStorage(built.data)) as image:
        tracemalloc.start()
        try:
            job = StreamJob(image)
            await job.run()
            assert (job.state, job.progress) == (State.COMPLETE, SIZE)
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
