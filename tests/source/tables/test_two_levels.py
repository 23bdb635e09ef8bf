"""The tables of an image: how few reads look-ups take, how little memory, and what the extents say."""

from __future__ import annotations

from array import array
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfs.errors import SourceError
from qedfs.format.tables import decode_table, encode_table
from qedfs.host import memory_pool
from qedfs.source.base import Identity, Sameness
from qedfs.source.tables import two_levels
from qedfs.source.tables.faults import Fault
from qedfs.source.tables.two_levels import Layout, TwoLevels, disk_identity
from tests.source.qcow2.support import MemorySource

KIB = 1 << 10
TABLE = 512  # entries
SPAN = TABLE * 4 * KIB


def place(entry: int) -> int | None:
    if entry % 2:
        raise Fault("is odd")
    return entry or None


def layout(l1_entries: int) -> Layout:
    """Clusters and tables of 4 KiB."""
    return Layout(12, 9, l1_entries * SPAN, 4 * KIB, l1_entries, decode_table, place, lambda entry: entry <= 1)


def file_of(l1: list[int], *tables: list[int]) -> bytes:
    parts = (bytes(4 * KIB), *(encode_table(array("Q", each)).ljust(4 * KIB, b"\0") for each in (l1, *tables)))
    return b"".join(parts)


async def loaded(file: bytes, l1_entries: int) -> tuple[TwoLevels, MemorySource]:
    source = MemorySource(file)
    tables = await TwoLevels.load(source, "disk.img", layout(l1_entries), b"head")
    source.reads.clear()
    return tables, source


FILE = file_of([0, 8 * KIB, 12 * KIB, 3], [1, 5, 0, 7], [2] * TABLE)


async def test_entries_across_tables_cost_one_read_and_are_kept() -> None:
    tables, source = await loaded(FILE, 4)
    for _ in range(2):
        found = await tables.entries(SPAN - 1, SPAN + 2, urgent=True)
        assert found == [0, 1, 5, 0, 7, *([0] * (TABLE - 4)), 2]
        assert source.reads == [(8 * KIB, 8 * KIB, True)]
    with pytest.raises(SourceError, match=r"^backing disk\.img is odd"):
        await tables.entries(3 * SPAN, 1, urgent=False)
    assert tables.zeros_now(0, SPAN + 4096)
    assert not tables.zeros_now(SPAN + 4096, 1)
    assert not tables.zeros_now(0, 4 * SPAN)


async def test_those_who_need_one_table_share_its_read() -> None:
    tables, source = await loaded(FILE, 4)
    source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for pos in range(SPAN, SPAN + 9 * 4096, 4096):
            nursery.start_soon(partial(tables.entries, pos, 1, urgent=False))
        await wait_all_tasks_blocked()
        assert len(source.reads) == 1
        source.gate.set()


async def test_extents_go_by_tables_where_there_are_none() -> None:
    tables, source = await loaded(FILE, 4)
    assert not await tables.extents(5, 0)
    (hole,) = await tables.extents(100, 4 * SPAN - 100)
    assert (hole.pos, hole.size, hole.zero, source.reads) == (100, SPAN - 100, True, [])
    found = [(each.pos - SPAN, each.size, each.zero) for each in await tables.extents(SPAN + 7, 4 * 4096)]
    # The last entry is data, and the one after it, of which the range has 7 bytes, is none.
    assert found == [(7, 4089, True), (4096, 4096, False), (8192, 4096, True), (12288, 4096, False), (16384, 7, True)]


async def test_the_memory_is_counted_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory_pool.TABLES.used_bytes
    tables, _ = await loaded(FILE, 4)
    await tables.entries(SPAN, 1, urgent=False)
    assert memory_pool.TABLES.used_bytes > before + 8 * KIB
    tables.close()
    assert memory_pool.TABLES.used_bytes == before
    monkeypatch.setattr(memory_pool.TABLES, "most_bytes", 1)
    monkeypatch.setattr(two_levels, "L1_READ_BYTES", 4 * KIB)
    with pytest.raises(SourceError, match="its L1 table takes more than the"):
        await loaded(file_of([2] * 4 * TABLE), 4 * TABLE)
    assert memory_pool.TABLES.used_bytes == before


async def test_the_stamp_and_the_length_tell_versions_apart() -> None:
    one, _ = await loaded(FILE, 4)
    other, _ = await loaded(FILE[: 4 * KIB] + b"\2" + FILE[4 * KIB + 1 :], 4)
    file = Identity(len(FILE), name="there")
    first = disk_identity(file, 5, "QED", one.stamp)
    assert (first.size, first.name) == (5, "there")
    assert first.compare(disk_identity(file, 5, "QED", one.stamp)).sameness is Sameness.PRESUMED
    assert first.compare(disk_identity(file, 5, "QED", other.stamp)).sameness is Sameness.CHANGED
    assert first.compare(disk_identity(Identity(1), 5, "QED", one.stamp)).sameness is Sameness.CHANGED
