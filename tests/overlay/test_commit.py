"""Groups, barriers, closes, the end of the file: what the committer promises beside the order of the power cuts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.tables import MISSING
from qedfs.host import memory_pool
from qedfs.overlay.clustermap import Run
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage, RecordingStorage
from tests.overlay.guest import no_fill, read
from tests.overlay.images import empty
from tests.overlay.scenario import repeatable

T = TypeVar("T")
CLUSTER = 4096


@pytest.mark.parametrize("seed", range(40))
def test_growing_the_file_never_cuts_a_write_that_runs_beside_it(seed: int) -> None:
    """A group grows the file to whole clusters while others write behind the end that the group saw."""

    async def main() -> None:
        overlay = await open_storage(MemoryStorage(empty(backing=b"").data, seed=seed))

        async def write(cluster: int) -> None:
            for _ in range(3 * cluster):
                await trio.lowlevel.checkpoint()
            # The rest of the cluster stays unwritten, so that the file's length is not whole.
            await overlay.write(cluster * CLUSTER, bytes([cluster + 1]) * 512, no_fill)

        async with trio.open_nursery() as nursery:
            for cluster in range(6):
                nursery.start_soon(write, cluster)
        for cluster in range(6):
            assert await read(overlay, cluster * CLUSTER, 512) == bytes([cluster + 1]) * 512

    with repeatable(seed):
        trio.run(main)


def entry_in_file(storage: MemoryStorage) -> int:
    """The entry of cluster 0 in the first table that L1 names."""
    table = int.from_bytes(storage.bytes[8192:8200], "little")
    return int.from_bytes(storage.bytes[table : table + 8], "little") if table else 0


async def test_a_write_in_place_waits_for_the_entry_that_is_under_way() -> None:
    """Without a journal an answered write must be found by the next open, also one that needed no new entry."""
    for seed in range(30):
        storage = MemoryStorage(empty(backing=b"").data, seed=seed)
        overlay = await open_storage(storage)
        await overlay.write(CLUSTER, b"0" * 512, no_fill)

        async def second(overlay: Overlay = overlay, storage: MemoryStorage = storage) -> None:
            while not overlay.clusters.is_loaded(0, 512) or not overlay.clusters.data_offset(0, 512):
                await trio.lowlevel.checkpoint()
            await overlay.write(0, b"2" * 512, no_fill)
            assert entry_in_file(storage)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(second)
            nursery.start_soon(overlay.write, 0, b"1" * 512, no_fill)


async def test_waiting_writers_share_barriers() -> None:
    storage = RecordingStorage(empty(backing=b"").data, seed=1)
    overlay = await open_storage(storage)
    before = overlay.barriers
    async with trio.open_nursery() as nursery:
        for cluster in range(20):
            nursery.start_soon(overlay.write, cluster * CLUSTER, b"x" * CLUSTER, no_fill)
    assert overlay.barriers - before <= 3


@pytest.mark.parametrize("how", ["commit", "flush", "change_record", "detach"])
async def test_a_failed_barrier_makes_the_overlay_read_only(how: str) -> None:
    storage = MemoryStorage(empty().data)
    overlay = await open_storage(storage)
    await overlay.adopt(0, bytearray(b"x" * CLUSTER), CLUSTER)
    storage.fail("barrier", QedfsError("cannot sync: Input/output error"))
    arguments = (lambda record: record,) if how == "change_record" else ()
    with pytest.raises(ReadOnlyOverlay, match="Input/output error; it is read-only until it is opened again"):
        await getattr(overlay, how)(*arguments)
    storage.mend()

    assert not overlay.writable
    # Nobody knows whether the disk has its data: the source is asked again.
    assert await overlay.map(0, CLUSTER) == [Run(MISSING, 0, CLUSTER)]
    for refused in (
        lambda: overlay.write(0, b"y" * 512, no_fill),
        lambda: overlay.adopt(CLUSTER, bytearray(b"y" * CLUSTER), CLUSTER),
        lambda: overlay.adopt_zeros(1, 1),
        lambda: overlay.change_record(lambda record: record),
        overlay.detach,
        overlay.commit,
        overlay.flush,
    ):
        with pytest.raises(ReadOnlyOverlay):
            await refused()
    with pytest.raises(ReadOnlyOverlay):
        await overlay.close()
    assert await (await open_storage(MemoryStorage(storage.bytes))).map(0, 512)


class Cold(MemoryStorage):
    """Has nothing in the page cache, once told so."""

    cold = False

    def read_now(self, offset: int, view: memoryview) -> bool:
        return not self.cold and super().read_now(offset, view)


async def test_a_disk_that_cannot_be_read_at_the_close_keeps_nothing_open(tmp_path: Path) -> None:
    """What was promised is durable; what is missing is the word that the session has ended in order."""
    used_bytes = memory_pool.TABLES.used_bytes
    storage = Cold(empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    storage.cold = True
    storage.fail("read", QedfsError("EIO"), forever=True)
    await overlay.close()
    assert (storage.closed, memory_pool.TABLES.used_bytes, os.listdir(tmp_path)) == (True, used_bytes, [])
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"))
    assert await read(again, 0, CLUSTER) == b"x" * CLUSTER


class LateRead(Cold):
    """A thread that has read, and has not told yet."""

    def __init__(self, data: bytes | bytearray, *, writable: bool) -> None:
        super().__init__(data, writable=writable)
        self.has_read, self.may_return = trio.Event(), trio.Event()

    async def in_thread(self, function: Callable[[], T]) -> T:
        result = await super().in_thread(function)
        if self.cold:
            self.has_read.set()
            await self.may_return.wait()
        return result


async def test_a_table_that_is_read_over_the_close_takes_no_memory() -> None:
    used_bytes = memory_pool.TABLES.used_bytes
    built = MemoryStorage(empty().data)
    overlay = await open_storage(built)
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    await overlay.close()
    storage = LateRead(built.bytes, writable=False)
    overlay = await open_storage(storage)
    storage.cold = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.map, 0, CLUSTER)
        await storage.has_read.wait()
        await overlay.close()
        storage.may_return.set()
    assert memory_pool.TABLES.used_bytes == used_bytes


class Rereading(MemoryStorage):
    """Stops between a failed barrier and the look at what the disk has."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(data, name="disk")
        self.begun, self.may_go_on = trio.Event(), trio.Event()

    async def in_thread(self, function: Callable[[], T]) -> T:
        refreshes = self.operations["refresh"]
        result = await super().in_thread(function)
        if self.operations["refresh"] > refreshes:
            self.begun.set()
            await self.may_go_on.wait()
        return result


async def a_flush_fails_behind_its_entries(overlay: Overlay, storage: Rereading) -> None:
    storage.fail("barrier", QedfsError("EIO"), nth=2)
    with pytest.raises(ReadOnlyOverlay, match="EIO"):
        await overlay.flush()


async def test_nobody_reads_between_a_failed_barrier_and_what_the_disk_has(tmp_path: Path) -> None:
    """The disk has the new table: to call it missing would show the backing's old bytes for a moment."""
    storage = Rereading(empty().data)
    storage.may_go_on.set()
    overlay = await open_storage(storage, journal_folder=tmp_path)
    storage.begun, storage.may_go_on = trio.Event(), trio.Event()
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    seen: list[list[Run]] = []

    async def look() -> None:
        await storage.begun.wait()
        seen.append(await overlay.map(0, CLUSTER))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        nursery.start_soon(a_flush_fails_behind_its_entries, overlay, storage)
        await trio.testing.wait_all_tasks_blocked()
        storage.may_go_on.set()
    assert seen == [[Run(entry_in_file(storage), 0, CLUSTER)]]


async def test_a_write_that_waited_over_a_failed_barrier_writes_and_hides_nothing(tmp_path: Path) -> None:
    storage = Rereading(empty().data)
    storage.may_go_on.set()
    overlay = await open_storage(storage, journal_folder=tmp_path)
    storage.begun, storage.may_go_on = trio.Event(), trio.Event()
    await overlay.write(0, b"x" * CLUSTER, no_fill)

    async def late_fill(cluster: int) -> bytes:
        await storage.begun.wait()
        return bytes(CLUSTER)

    async def write_late() -> None:
        with pytest.raises(ReadOnlyOverlay, match="EIO"):
            await overlay.write(CLUSTER, b"y" * 512, late_fill)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_late)
        nursery.start_soon(a_flush_fails_behind_its_entries, overlay, storage)
        await storage.begun.wait()
        left = bytes(storage.bytes)
        await trio.testing.wait_all_tasks_blocked()
        storage.may_go_on.set()
    assert await overlay.map(0, CLUSTER) == [Run(entry_in_file(storage), 0, CLUSTER)]
    assert bytes(storage.bytes) == left


async def test_a_failed_barrier_behind_a_detach_is_no_detach() -> None:
    storage = MemoryStorage(empty().data)
    overlay = await open_storage(storage)
    storage.fail("barrier", QedfsError("cannot sync"), nth=2)
    with pytest.raises(ReadOnlyOverlay):
        await overlay.detach()
    assert overlay.backing is not None
    assert not overlay.writable


async def test_a_close_whose_flush_fails_waits_for_the_commit_behind_it(tmp_path: Path) -> None:
    """Otherwise that one would go on with a descriptor that is closed, or is another file by then."""
    waited = 0
    for seed in range(30):
        storage = MemoryStorage(empty().data, name="disk", seed=seed)
        overlay = await open_storage(storage, journal_folder=tmp_path)
        await overlay.write(0, b"x" * CLUSTER, no_fill)
        storage.fail("write", NoSpace("full"))
        committed: list[bool] = []
        # Neither ends the other by its error.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_without_space, overlay)
            while not (overlay.committer._running or storage.closed):
                await trio.lowlevel.checkpoint()
            nursery.start_soon(_commit_unless_closed, overlay, storage, committed)
        assert storage.closed
        assert bool(entry_in_file(storage)) == any(committed)
        waited += any(committed)
        with pytest.raises(ReadOnlyOverlay, match="closed"):
            await overlay.flush()
    assert waited  # the thread of the group is hardly ever faster than the loop


class Frozen(MemoryStorage):
    """The thread that waits for the thaw of its file system does so until it is told."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(data, name="disk")
        self.waits, self.thaw = trio.Event(), trio.Event()

    async def in_thread(self, function: Callable[[], T]) -> T:
        if self.frozen:
            self.waits.set()
            await self.thaw.wait()
        return await super().in_thread(function)


async def test_the_end_of_the_commits_waits_for_a_group_that_has_not_begun_to_write(tmp_path: Path) -> None:
    """Its thread has the descriptor of the file, which is closed next, and no barrier runs that the end would meet."""
    storage = Frozen(empty().data)
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    storage.frozen = True
    ended = trio.Event()

    async def end() -> None:
        async with overlay.committer.ended():
            assert not overlay.commit_pending
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.commit)
        await storage.waits.wait()
        nursery.start_soon(end)
        await trio.testing.wait_all_tasks_blocked()
        assert not ended.is_set()
        storage.thaw.set()
    assert ended.is_set()
    assert entry_in_file(storage)


async def _close_without_space(overlay: Overlay) -> None:
    with pytest.raises(NoSpace):
        await overlay.close()


async def _commit_unless_closed(overlay: Overlay, storage: MemoryStorage, committed: list[bool]) -> None:
    with contextlib.suppress(ReadOnlyOverlay):
        await overlay.commit()
        assert not storage.closed  # the close has waited
        committed.append(True)


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_full_disk_loses_no_entry(nth: int) -> None:
    """Each write of a group (two new tables, one L1 sector) fails in turn; the next commit brings all of it."""
    storage = MemoryStorage(empty(image_size=4 << 20).data)
    overlay = await open_storage(storage)
    for pos in (0, 2 << 20):
        await overlay.adopt(pos, bytearray(b"x" * CLUSTER), CLUSTER)
    storage.fail("write", NoSpace("full"), nth=nth)
    with pytest.raises(NoSpace):
        await overlay.commit()
    await overlay.adopt(CLUSTER, bytearray(b"y" * CLUSTER), CLUSTER)
    await overlay.flush()

    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    assert await read(again, 0, 2 * CLUSTER) == b"x" * CLUSTER + b"y" * CLUSTER
    assert await read(again, 2 << 20, CLUSTER) == b"x" * CLUSTER


async def test_what_a_stream_has_brought_leaves_the_page_cache_in_few_calls() -> None:
    """The flights of a stream are neighbours in the file, whatever their order: a table in between parts them."""
    dropped: list[tuple[int, int]] = []

    class Dropping(MemoryStorage):
        def drop_cache(self, offset: int, size: int) -> None:
            dropped.append((offset, size))

    overlay = await open_storage(Dropping(empty(table_size=4).data))
    for flight in (2, 0, 1, 3):
        fetched = bytearray(b"f" * (8 * CLUSTER))
        await overlay.adopt(flight * len(fetched), fetched, len(fetched), cold=True)
    await overlay.commit()
    assert sum(size for _, size in dropped) == 4 * 8 * CLUSTER
    assert len(dropped) == 1
