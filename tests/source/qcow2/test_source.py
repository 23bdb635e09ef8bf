"""How the qcow2 source uses the one that has the file: what passes through, and how few reads it takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.source.base import Identity, Sameness, Source
from qedfs.source.qcow2 import Qcow2Source
from qedfs.source.retrying import RetryingSource
from qedfs.source.samples import Samples
from qedfs.source.url import parse_location
from tests.source.qcow2.build import deflated, image, packed_entry
from tests.source.qcow2.support import KiB, MemorySource, MiB, convert, opened, qemu_img, qemu_io, read

SIZE = 4 * MiB + 512


def text(size: int, *, seed: int = 3) -> bytes:
    """What deflate makes small, but not the same everywhere."""
    source = random.Random(seed)
    words = [source.randbytes(4).hex().encode() for _ in range(500)]
    return b" ".join(source.choices(words, k=size // 8))[:size].ljust(size, b".")


CONTENT = text(MiB) + bytes(MiB) + text(SIZE - 2 * MiB, seed=4)


@pytest.fixture(scope="module", params=["plain", "compressed"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("qcow2")
    (folder / "raw").write_bytes(CONTENT)
    return convert(folder / "raw", folder / "disk.qcow2", compress=request.param == "compressed")


# What it has of the source that has the file.


async def test_closing_closes_the_source_of_the_file(file: bytes) -> None:
    source, inner = await opened(file)
    await source.aclose()
    assert inner.closed
    with pytest.raises(SourceUnreachable, match=r"disk\.qcow2: closed"):
        await read(source, MiB, 1)


async def test_samples_are_of_the_file_and_not_of_the_image_in_it(file: bytes) -> None:
    async def connect() -> Source:
        return (await opened(file))[0]

    samples = Samples()
    for pos in range(0, MiB, 64 * KiB):
        samples.offer(pos, memoryview(file)[pos : pos + 64 * KiB])
    assert samples
    assert await RetryingSource(parse_location("http://memory/"), connect).difference(samples) is None


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


@pytest.mark.parametrize("error", [SourceUnreachable("away"), SourceChanged("new"), SourceError("gone")])
async def test_errors_of_the_file_pass_through(file: bytes, error: SourceError) -> None:
    source, inner = await opened(file)
    for warm in (False, True):
        inner.failure = error
        with pytest.raises(type(error)) as caught:
            await read(source, 0, SIZE)
        assert str(caught.value) == str(error), warm
        assert await read(source, 0, SIZE) == CONTENT


async def test_urgency_is_passed_on(file: bytes) -> None:
    source, inner = await opened(file)
    await read(source, 3 * MiB, 100, urgent=True)
    await read(source, 0, SIZE, urgent=True)
    assert {urgent for _, _, urgent in inner.reads} == {True}
    inner.reads.clear()
    await read(source, 0, SIZE)
    assert {urgent for _, _, urgent in inner.reads} == {False}


# Identity.


async def identity_of(file: bytes, **validators: str) -> Identity:
    inner = MemorySource(file, Identity(len(file), name="http://host/disk.qcow2", **validators))
    return (await Qcow2Source.open(inner, "disk.qcow2")).identity


async def test_identity_is_the_disks_size_and_the_files_version(file: bytes) -> None:
    identity = await identity_of(file, etag='"1"', last_modified="Mon", digest="md5:00", place="there")
    assert (identity.size, identity.name) == (SIZE, "http://host/disk.qcow2")
    assert (identity.digest, identity.place) == ("md5:00", "there")
    assert identity.compare(await identity_of(file, etag='"1"', last_modified="Mon")).sameness is Sameness.SAME
    # As for any other source: another date is no change while the ETag is the same.
    assert identity.compare(await identity_of(file, etag='"1"', last_modified="Tue")).sameness is Sameness.SAME
    assert identity.compare(await identity_of(file, etag='"2"')).why.startswith('ETag was "1" of qcow2')
    weak = await identity_of(file, etag='W/"1"')
    assert weak.compare(await identity_of(file, etag='W/"2"')).sameness is Sameness.CHANGED
    dated = await identity_of(file, last_modified="Mon")
    assert identity.compare(dated).sameness is Sameness.DOUBTED
    assert "Last-Modified was Mon of qcow2" in dated.compare(await identity_of(file, last_modified="Tue")).why
    # The tables alone do not stand for the data.
    bare = await identity_of(file)
    assert bare.compare(await identity_of(file)).sameness is Sameness.PRESUMED


@pytest.mark.parametrize("validators", [{}, {"etag": '"1"'}, {"last_modified": "Mon"}])
async def test_another_file_with_the_same_virtual_size_is_noticed(file: bytes, validators: dict[str, str]) -> None:
    identity = await identity_of(file, **validators)
    longer = await identity_of(file + bytes(512), **validators)
    told = validators.get("etag", validators.get("last_modified", "qcow2 file"))
    assert f"now {told}" in identity.compare(longer).why
    l1_offset = int.from_bytes(file[40:48], "big")
    moved = bytearray(file)
    moved[l1_offset + 5] ^= 1
    assert identity.compare(await identity_of(bytes(moved), **validators)).sameness is Sameness.CHANGED


async def test_received_is_that_of_the_file(file: bytes) -> None:
    source, inner = await opened(file)
    await read(source, 0, 100)
    assert source.received == inner.received > 0


# How many reads of the file.


async def reads_for(file: bytes, size: int, step: int, *, seen: bytes | None = None) -> list[tuple[int, int, bool]]:
    source, inner = await opened(file)
    for pos in range(0, size, step):
        data = await read(source, pos, min(step, size - pos))
        assert seen is None or data == seen[pos : pos + step]
    return inner.reads


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize(
    ("cluster_size", "size", "most"),
    [(512, 4 * MiB, 40), (4 * KiB, 8 * MiB, 12), (64 * KiB, 16 * MiB, 17), (2 * MiB, 16 * MiB, 17)],
)
async def test_sequential_reads_of_1_mib(
    tmp_path: Path, cluster_size: int, size: int, most: int, compress: bool
) -> None:
    content = text(size)
    (tmp_path / "raw").write_bytes(content)
    file = convert(tmp_path / "raw", tmp_path / "disk.qcow2", f"cluster_size={cluster_size}", compress=compress)
    reads = await reads_for(file, size, MiB, seen=content)
    # One for each, and a few for tables. With the smallest clusters QEMU puts a table between every 64 of them.
    assert len(reads) <= most
    assert sum(count for _, count, _ in reads) < 2.2 * len(file)


async def test_parts_of_a_compressed_cluster_cost_one_read(tmp_path: Path) -> None:
    content = text(4 * MiB)
    (tmp_path / "raw").write_bytes(content)
    file = convert(tmp_path / "raw", tmp_path / "disk.qcow2", "cluster_size=2M", compress=True)
    source, inner = await opened(file)

    async def one(pos: int) -> None:
        assert await read(source, pos, 64 * KiB) == content[pos : pos + 64 * KiB]

    async with trio.open_nursery() as nursery:
        for pos in range(0, 4 * MiB, 64 * KiB):
            nursery.start_soon(one, pos)
    assert len(inner.reads) == 3, "a table and two clusters"


async def test_readers_of_one_table_fetch_it_once(file: bytes) -> None:
    source, inner = await opened(file)
    inner.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for pos in range(0, SIZE, 64 * KiB):
            nursery.start_soon(read, source, pos, 1)
        await wait_all_tasks_blocked()
        assert len(inner.reads) == 1
        inner.gate.set()


async def test_zeros_cost_no_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "8G")
    qemu_io(path, "write -z 0 1M", "write 1M 64k")
    source, inner = await opened(path.read_bytes())
    assert await read(source, 0, MiB) == bytes(MiB)
    assert len(inner.reads) == 1, "the table"
    assert await read(source, 4 << 30, MiB) == bytes(MiB)
    assert [extent.zero for extent in await source.extents(0, MiB) or ()] == [True]
    assert len(inner.reads) == 1


async def test_table_of_large_clusters_is_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=2M", path, "300G")
    qemu_io(path, "write -P 3 299G 4k")
    source, inner = await opened(path.read_bytes())
    assert await read(source, 299 << 30, 8 * KiB) == b"\3" * 4096 + bytes(4096)
    assert [size for _, size, _ in inner.reads] == [64 * KiB, 8 * KiB]


async def test_memory_for_tables_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedfs.source.tables.two_levels.TABLE_CACHE_BYTES", 64 * KiB)
    # 1024 L1 entries that all lead to the same table.
    file = image({4096: [1024] * 1024}, l1_offset=4096, l1_size=1024, size=32 * MiB)
    source, inner = await opened(file)
    for pos in range(0, 32 * MiB, MiB):
        assert not any(await read(source, pos, MiB))
    assert source._tables._tables._share.held_bytes <= 64 * KiB
    assert len(inner.reads) == 32


async def test_extents_go_in_bounded_steps() -> None:
    # 64 MiB without a table but for one of zero clusters, 64 MiB of zero clusters, then a cluster with data.
    entries = 4096
    first = [0] * 511 + [1 << 16] + [0] * 1536
    file = image(
        {4096: first + [1 << 16] * (entries // 2 - 1) + [1024], 1 << 16: [1] * 64, 1024: [2048]},
        l1_offset=4096,
        l1_size=entries,
        size=entries * 64 * 512,
        file_size=1 << 17,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qedfs.source.tables.two_levels.EXTENTS_L1_ENTRIES", 200)
        patch.setattr("qedfs.source.tables.two_levels.EXTENTS_ENTRIES", 4000)
        source, inner = await opened(file)
        hole, at = [], 0
        while at < 64 * MiB:
            if at == 511 * 64 * 512:
                at += 64 * 512
            (extent,) = await source.extents(at, source.identity.size - at) or ()
            assert extent.zero
            hole.append(extent.size // (64 * 512))
            at += extent.size
        # Where L1 has an entry nearby it is looked at bit by bit, and pages of it without any cost nothing.
        assert hole == [200, 200, 111, 1536]
        assert inner.reads == []
        (extent,) = await source.extents(at + 1, source.identity.size - at - 1) or ()
        assert (extent.pos, extent.size, extent.zero) == (at + 1, 4000 * 512 - 1, True)
        last = source.identity.size - 65 * 512
        told = [(each.size, each.zero) for each in await source.extents(last, 65 * 512) or ()]
        assert told == [(512, True), (512, False), (63 * 512, True)]


async def test_urgent_reads_do_not_queue_for_a_thread_behind_others(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(CONTENT)
    source, _ = await opened(convert(tmp_path / "raw", tmp_path / "disk.qcow2", compress=True))
    limiter = source._threads[False]
    holders = range(int(limiter.total_tokens))
    for holder in holders:
        await limiter.acquire_on_behalf_of(holder)
    assert await read(source, 0, 64 * KiB, urgent=True) == CONTENT[: 64 * KiB]
    with trio.move_on_after(0) as scope:
        await read(source, 0, 64 * KiB)
    assert scope.cancelled_caught
    for holder in holders:
        limiter.release_on_behalf_of(holder)
    assert await read(source, 0, 64 * KiB) == CONTENT[: 64 * KiB]


# Damage.


async def test_the_first_failure_ends_the_other_reads_of_a_request() -> None:
    far = 40 << 10  # between the clusters, so that each has a read of its own
    file = image({512: [1024], 1024: [4096 + far * index for index in range(20)]}, file_size=1 << 20)
    source, inner = await opened(file)
    await read(source, 0, 1)
    inner.reads.clear()
    inner.failure = SourceUnreachable("away")
    with pytest.raises(SourceUnreachable, match="away"):
        await read(source, 0, 20 * 512)
    assert len(inner.reads) == 8
    inner.reads.clear()
    assert await read(source, 0, 20 * 512) == bytes(20 * 512)
    assert len(inner.reads) == 20


async def test_a_damaged_cluster_costs_only_itself() -> None:
    good = deflated(b"x" * 512)
    entries = [packed_entry(4096, len(good)), packed_entry(5000, 100), 1 << 50, 2048, 1 << 41]
    file = image({512: [1024], 1024: entries}, {4096: good, 5000: b"\xff" * 100, 2048: b"d" * 512})
    source, _ = await opened(file)
    assert await read(source, 0, 512) == b"x" * 512
    assert await read(source, 3 * 512, 512) == b"d" * 512
    for index, message in [
        (1, "compressed cluster that is damaged"),
        (2, "outside the file"),
        (4, "outside the file"),
    ]:
        for size in (512, 100):
            with pytest.raises(SourceError, match=rf"^backing disk\.qcow2 has .*{message}"):
                await read(source, 512 * index, size)
    with pytest.raises(SourceError, match="damaged"):
        await read(source, 0, 1024)
    assert [(each.size, each.zero) for each in await source.extents(0, 4096) or ()] == [(5 * 512, False), (1536, True)]


async def test_a_damaged_l1_entry_costs_only_its_range() -> None:
    file = image({512: [1 << 40, 1024], 1024: [2048]}, {2048: b"d" * 512})
    source, _ = await opened(file)
    assert await read(source, 64 * 512, 512) == b"d" * 512
    for action in (source.read(0, memoryview(bytearray(9))), source.extents(0, 9)):
        with pytest.raises(SourceError, match="has an L2 table at 0x10000000000, outside the file"):
            await action
