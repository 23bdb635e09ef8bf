"""How the QED source uses the one that has the file: what passes through, and how few reads it takes."""

from __future__ import annotations

import dataclasses
import logging
import random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.format.header import UNTOUCHED
from qedfs.format.record import SLOT_BYTES, Record, encode_record
from qedfs.source.base import HasFile, Identity, KnowsZeros, Sameness
from qedfs.source.qed import QedSource
from qedfs.source.samples import Samples
from tests.source.qcow2.support import MemorySource
from tests.source.qed.support import CLUSTER, DATA, L1, L2, KiB, MiB, image, opened, qed_of, read

SIZE = 4 * MiB + 512
CONTENT = random.Random(3).randbytes(MiB) + bytes(MiB) + random.Random(4).randbytes(SIZE - 2 * MiB)


@pytest.fixture(scope="module", params=[(), ("cluster_size=4096", "table_size=2"), ("cluster_size=1M",)], ids=str)
def file(request: pytest.FixtureRequest) -> bytes:
    return qed_of(CONTENT, *request.param)


async def test_the_disk_at_random(file: bytes) -> None:
    source, _ = await opened(file)
    assert source.identity.size == SIZE
    numbers = random.Random(5)
    for _ in range(100):
        pos = numbers.randrange(SIZE)
        size = numbers.randint(1, min(SIZE - pos, 3 * MiB))
        assert await read(source, pos, size) == CONTENT[pos : pos + size]


async def test_sequential_reads_cost_one_read_each_and_the_tables(file: bytes) -> None:
    source, inner = await opened(file)
    for pos in range(0, SIZE, 256 * KiB):
        assert await read(source, pos, min(256 * KiB, SIZE - pos), urgent=True) == CONTENT[pos : pos + 256 * KiB]
    assert len(inner.reads) <= 17 - 4 + 4, "nothing for the hole"
    assert {urgent for _, _, urgent in inner.reads} == {True}
    assert sum(size for _, size, _ in inner.reads) <= SIZE - MiB + 4 * 64 * KiB
    assert source.received == inner.received


async def test_holes_cost_no_read(file: bytes) -> None:
    source, inner = await opened(file)
    assert isinstance(source, KnowsZeros)
    await read(source, 0, 1)
    inner.reads.clear()
    assert source.zeros_now(MiB, MiB)
    assert not source.zeros_now(MiB - 1, 2)
    assert not source.zeros_now(SIZE - 1, 2)
    assert await read(source, MiB, MiB) == bytes(MiB)
    (extent,) = await source.extents(MiB, MiB) or ()
    assert (extent.pos, extent.size, extent.zero) == (MiB, MiB, True)
    assert inner.reads == []


async def test_scattered_clusters_and_zero_clusters() -> None:
    clusters = {DATA + CLUSTER * index: bytes([index + 1]) * CLUSTER for index in range(10)}
    order = [DATA + CLUSTER * index for index in (9, 0, 5, 4, 1)]
    source, inner = await opened(image({L1: [L2], L2: [*order, 1, 0, DATA]}, clusters))
    expected = b"".join(clusters[offset] for offset in order) + bytes(2 * CLUSTER) + clusters[DATA]
    assert await read(source, 5, 8 * CLUSTER - 10) == expected[5:-5]
    assert len(inner.reads) == 2, "the table, and the clusters with what is between them"
    assert [extent.zero for extent in await source.extents(0, 9 * CLUSTER) or ()] == [False, True, False, True]


async def test_errors_of_the_file_pass_through(file: bytes) -> None:
    source, inner = await opened(file)
    for error in (SourceUnreachable("away"), SourceChanged("new"), SourceError("gone")):
        inner.failure = error
        with pytest.raises(type(error), match=str(error)):
            await read(source, 0, SIZE)
        assert await read(source, 0, 4 * KiB) == CONTENT[: 4 * KiB]


async def test_samples_are_of_the_file(file: bytes) -> None:
    source, inner = await opened(file)
    assert isinstance(source, HasFile)
    samples = Samples()
    samples.offer(0, memoryview(file)[: 64 * KiB])
    assert await samples.difference(source.file.read, len(file)) is None
    await source.aclose()
    assert inner.closed
    with pytest.raises(SourceUnreachable, match=r"backing disk\.qed: closed"):
        await read(source, 0, 1)
    assert not source.zeros_now(MiB, MiB)


async def test_closing_ends_a_read_in_flight(file: bytes) -> None:
    source, inner = await opened(file)
    inner.gate = trio.Event()
    async with trio.open_nursery() as nursery:

        async def reader() -> None:
            with pytest.raises(SourceUnreachable, match="closed"):
                await read(source, 0, MiB)

        nursery.start_soon(reader)
        await wait_all_tasks_blocked()
        await source.aclose()
        inner.gate.set()


async def identity_of(file: bytes, etag: str | None = None) -> Identity:
    return (await QedSource.open(MemorySource(file, Identity(len(file), etag, name="there")), "disk.qed")).identity


async def test_another_file_with_the_same_virtual_size_is_noticed(file: bytes) -> None:
    for etag in (None, '"1"'):
        identity = await identity_of(file, etag)
        longer = await identity_of(file + bytes(MiB), etag)
        assert identity.compare(longer).sameness is Sameness.CHANGED
        l1_offset = int.from_bytes(file[40:48], "little")
        moved = bytearray(file)
        moved[l1_offset + 8] ^= 1
        again = await identity_of(file, etag)
        assert identity.compare(again).sameness is (Sameness.SAME if etag else Sameness.PRESUMED)
    assert "now QED file of" in (await identity_of(file)).compare(await identity_of(file + bytes(MiB))).why


async def test_a_damaged_entry_costs_only_itself() -> None:
    entries = [DATA, 2, 1 << 40, DATA + 512, CLUSTER - 8, DATA + CLUSTER]
    file = image({L1: [L2, 0, 1, 1 << 50], L2: entries}, {DATA: b"d" * 2 * CLUSTER}, size=4 << 21)
    source, _ = await opened(file)
    for index in (0, 5):
        assert await read(source, index * CLUSTER, CLUSTER) == b"d" * CLUSTER
    for index in (1, 2, 3, 4):
        with pytest.raises(SourceError, match=r"^backing disk\.qed has a cluster at 0x\w+, which is no place for one"):
            await read(source, index * CLUSTER + 7, 100)
    for table in (2, 3):
        for action in (source.read(table << 21, memoryview(bytearray(9))), source.extents(table << 21, 9)):
            with pytest.raises(SourceError, match=r"^backing disk\.qed has an L2 table at 0x\w+, which is no place"):
                await action
    assert await read(source, 1 << 21, 9) == bytes(9)


async def test_what_was_not_closed_cleanly_is_read_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        source, _ = await opened(image({L1: [L2], L2: [DATA]}, {DATA: b"d" * CLUSTER}, features=2))
    assert await read(source, 0, CLUSTER + 1) == b"d" * CLUSTER + b"\0"
    assert [record.getMessage() for record in caplog.records] == [
        "backing disk.qed was not closed cleanly; it is read as it is, see qemu-img check"
    ]


@pytest.mark.parametrize("untouched", [True, False])
async def test_an_image_whose_mount_has_not_ended_is_read_and_told(
    caplog: pytest.LogCaptureFixture, untouched: bool
) -> None:
    journal = Record(session="5" * 32, journal="1000.7.abc", sequence=3)
    for record in (journal, dataclasses.replace(journal, journal=""), Record(sequence=4)):
        caplog.clear()
        clusters = {DATA: b"d" * CLUSTER, CLUSTER - SLOT_BYTES: encode_record(record)}
        file = image({L1: [L2], L2: [DATA]}, clusters, autoclear=UNTOUCHED if untouched else 0)
        source, _ = await opened(file)
        assert await read(source, 0, CLUSTER) == b"d" * CLUSTER
        told = [message for message in caplog.messages if "or was when that mount was killed" in message]
        assert len(told) == (untouched and record is journal)
