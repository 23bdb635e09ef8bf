"""The backing as a file that a commit writes to: a raw file, in memory and on a disk, and another QED overlay."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qedfs.errors import InUse, NoSpace, QedfsError, UsageError
from qedfs.image.commit_target import BLOCK_BYTES, RawTarget, Target
from qedfs.image.qed_target import QedTarget
from qedfs.overlay.storage import FileStorage, Storage
from tests.fakes.storage import BarrierEnded, MemoryStorage, RecordingStorage, Written
from tests.overlay.examine import read_content
from tests.overlay.images import empty, filled

KIB = 1024
SIZE = 512 * KIB
OLD = random.Random(1).randbytes(SIZE)
NEW = random.Random(2).randbytes(SIZE)
Content = Callable[[], bytes]


@pytest.fixture(params=["raw in memory", "raw file", "QED", "QED with larger clusters"])
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Target, Callable[[], Storage]]:
    """A target of SIZE bytes with OLD, and what opens the file again."""
    match request.param:
        case "raw in memory":
            memory = MemoryStorage(OLD)
            return await RawTarget.of(memory, lambda: None), lambda: MemoryStorage(memory.bytes)
        case "raw file":
            path = tmp_path / "raw"
            path.write_bytes(OLD)
            storage = FileStorage.open(str(path), writable=True)
            return await RawTarget.of(storage, lambda: None), lambda: FileStorage.open(str(path), writable=False)
    size = 4096 if request.param == "QED" else 64 * KIB
    parts: dict[int, bytes | int] = {n: OLD[n * size : (n + 1) * size] for n in range(SIZE // size)}
    qed = MemoryStorage(filled(parts, cluster_size=size, image_size=SIZE, backing=b"").data)
    return await QedTarget.of("disk", qed, lambda: qed), lambda: MemoryStorage(qed.bytes)


async def content(target: Target, again: Callable[[], Storage]) -> bytes:
    storage = again()
    data = bytearray(storage.size())
    storage.read(0, memoryview(data))
    return await read_content(data, bytes(2 * SIZE)) if isinstance(target, QedTarget) else bytes(data)


async def test_it_has_what_was_stored(opened: tuple[Target, Callable[[], Storage]]) -> None:
    target, again = opened
    assert target.size == SIZE
    await target.begin()
    await target.grow(2 * SIZE)
    assert await target.store(4096, memoryview(NEW)[: 100 * KIB]) == 100 * KIB
    assert await target.store(SIZE + 64 * KIB, memoryview(NEW)[: 8 * KIB]) == 8 * KIB
    assert await target.zero(200 * KIB, 64 * KIB) == 64 * KIB
    assert await target.zero(SIZE, 4096) in (0, 4096)
    await target.sync()
    await target.close()
    wanted = bytearray(OLD + bytes(SIZE))
    wanted[4096 : 4096 + 100 * KIB] = NEW[: 100 * KIB]
    wanted[SIZE + 64 * KIB : SIZE + 72 * KIB] = NEW[: 8 * KIB]
    wanted[200 * KIB : 264 * KIB] = bytes(64 * KIB)
    assert await content(target, again) == wanted


async def test_only_blocks_that_differ_are_written() -> None:
    storage = RecordingStorage(OLD)
    target = await RawTarget.of(storage, lambda: None)
    data = bytearray(OLD)
    data[3 * BLOCK_BYTES + 5] ^= 1
    assert await target.store(0, memoryview(data)) == BLOCK_BYTES
    assert await target.store(0, memoryview(data)) == 0
    writes = [entry for entry in storage.log if isinstance(entry, Written)]
    assert [(entry.offset, len(entry.data)) for entry in writes] == [(3 * BLOCK_BYTES, BLOCK_BYTES)]


async def test_what_differs_does_not_depend_on_the_calls_it_comes_in() -> None:
    data = bytearray(OLD)
    for pos in (5 * KIB, 64 * KIB, 300 * KIB):
        data[pos] ^= 1
    target = RawTarget(MemoryStorage(OLD, writable=False), lambda: None, dry=True)
    for bounds in ((4 * KIB, SIZE), (4 * KIB, 64 * KIB, 192 * KIB, SIZE)):
        parts = itertools.pairwise(bounds)
        assert sum([await target.store(at, memoryview(data)[at:end]) for at, end in parts]) == 3 * BLOCK_BYTES - 4 * KIB


async def test_zeros_become_holes_and_holes_stay_so(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(OLD)
    target = await RawTarget.of(FileStorage.open(str(path), writable=True), lambda: None)
    before = path.stat().st_blocks
    assert await target.zero(64 * KIB, 256 * KIB) == 256 * KIB
    assert await target.zero(64 * KIB, 256 * KIB) == 0
    assert path.stat().st_blocks < before
    assert path.read_bytes() == OLD[: 64 * KIB] + bytes(256 * KIB) + OLD[320 * KIB :]
    await target.close()


async def test_where_no_hole_can_be_punched_zeros_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage(OLD)
    monkeypatch.setattr(storage, "punch", lambda offset, size: False)
    target = await RawTarget.of(storage, lambda: None)
    assert await target.zero(4096, 8192) == 8192
    assert storage.bytes == OLD[:4096] + bytes(8192) + OLD[12288:]
    assert await target.zero(4096, 8192) == 0


async def test_what_the_disk_did_not_take_is_not_taken_for_equal() -> None:
    """After a write-back that has failed, the page cache has the bytes, and the disk has not."""
    storage = RecordingStorage(OLD)
    storage.write(0, [NEW[:4096]])
    storage.lose_now(random.Random(1), told=True)
    target = await RawTarget.of(storage.reopened(), lambda: None)
    assert await target.store(0, memoryview(NEW)[:4096]) == 4096


async def test_the_times_become_durable_after_the_bytes() -> None:
    storage = RecordingStorage(OLD)
    target = await RawTarget.of(storage, lambda: storage.mark("times"))
    storage.log.clear()
    await target.store(0, memoryview(NEW))
    await target.sync()
    assert isinstance(storage.log[-2], BarrierEnded)
    assert getattr(storage.log[-1], "text", "") == "times"

    def fails() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(QedfsError, match="memory: cannot sync: Input/output error"):
        await (await RawTarget.of(storage, fails)).sync()


async def test_a_full_disk_is_an_error_and_so_is_a_file_in_use(tmp_path: Path) -> None:
    storage = MemoryStorage(OLD)
    storage.fail("resize", NoSpace("full"))
    with pytest.raises(NoSpace):
        await (await RawTarget.of(storage, lambda: None)).grow(2 * SIZE)
    (tmp_path / "raw").write_bytes(OLD)
    FileStorage.open(str(tmp_path / "raw"), writable=True)
    with pytest.raises(InUse):
        FileStorage.open(str(tmp_path / "raw"), writable=True)


@pytest.mark.parametrize(
    ("cluster_size", "image_size", "text"),
    [
        (64 * KIB, SIZE, "clusters of 65536 bytes over a backing of its own"),
        (4096, SIZE - 4096, "fewer than the 524288 of the image"),
    ],
)
async def test_an_overlay_over_a_backing_of_its_own_is_not_filled_from_there(
    cluster_size: int, image_size: int, text: str
) -> None:
    made = empty(cluster_size=cluster_size, image_size=image_size)
    target = await QedTarget.of("disk", storage := MemoryStorage(made.data), lambda: storage)
    with pytest.raises(UsageError, match=text):
        target.check(4096, SIZE)


async def test_an_overlay_over_a_backing_gets_whole_clusters_and_zeros_that_hide_it() -> None:
    storage = MemoryStorage(empty(cluster_size=4096, image_size=SIZE).data)
    target = await QedTarget.of("disk", storage, lambda: storage)
    target.check(64 * KIB, SIZE)
    await target.begin()
    await target.store(64 * KIB, memoryview(NEW)[: 64 * KIB])
    await target.zero(256 * KIB, 64 * KIB)
    await target.close()
    wanted = bytearray(OLD)
    wanted[64 * KIB : 128 * KIB] = NEW[: 64 * KIB]
    wanted[256 * KIB : 320 * KIB] = bytes(64 * KIB)
    assert await read_content(storage.bytes, OLD) == wanted
    storage = MemoryStorage(empty(cluster_size=4096, image_size=SIZE).data)
    odd = await QedTarget.of("disk", storage, lambda: storage)
    with pytest.raises(UsageError, match="do not fill them"):
        odd.check(64 * KIB, SIZE - 512)


async def test_a_dry_run_writes_nothing() -> None:
    raw = MemoryStorage(OLD, writable=False)
    qed = MemoryStorage(empty(cluster_size=4096, image_size=SIZE).data, writable=False)
    for target in (RawTarget(raw, lambda: None, dry=True), await QedTarget.of("disk", qed, lambda: qed, dry=True)):
        await target.begin()
        await target.grow(2 * SIZE)
        assert await target.store(0, memoryview(NEW)[: 64 * KIB]) == 64 * KIB
        assert await target.zero(64 * KIB, 64 * KIB) == 64 * KIB
        await target.close()
    assert raw.bytes == OLD
