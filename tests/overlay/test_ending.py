"""The end of an overlay by which it loses all its clusters, and every moment at which a power cut may come."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.errors import QedfsError, ReadOnlyOverlay
from qedfs.format.record import Standby
from qedfs.format.tables import MISSING
from qedfs.image.standby_record import put_in_standby, record_active, record_emptying
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage, RecordingStorage
from tests.overlay.cuts import Disk
from tests.overlay.images import empty

CLUSTER = 1 << 12
CLUSTERS = 2000  # in more than one table
OLD = random.Random(1).randbytes(CLUSTER)


async def activated(storage: MemoryStorage) -> Overlay:
    """An overlay with some clusters that were adopted since its activation, in the file and waiting for it."""
    overlay = await open_storage(storage)
    await put_in_standby("disk.qed", overlay)
    await record_active(overlay, None)
    for cluster in (0, 1, 7, 1500):
        await overlay.adopt(cluster * CLUSTER, bytearray(OLD), CLUSTER)
        if cluster == 1:
            await overlay.flush()
    return overlay


def new_file(kind: type[MemoryStorage] = MemoryStorage) -> MemoryStorage:
    built = empty(cluster_size=CLUSTER, table_size=1, image_size=CLUSTERS * CLUSTER, backing=b"http://fake/disk.raw")
    return kind(built.data)


async def found(data: bytes | bytearray) -> tuple[Standby, int | None]:
    """What the next session finds: the record, and how many clusters are missing."""
    overlay = await open_storage(MemoryStorage(data))
    await overlay.count_missing()
    result = overlay.record.standby, overlay.missing
    await overlay.close()
    return result


async def test_the_emptied_overlay_is_as_new_and_can_be_filled_again() -> None:
    storage = new_file()
    before = len(storage.bytes)
    overlay = await activated(storage)
    await record_emptying("disk.raw", overlay)
    again = await open_storage(await overlay.empty())
    await again.count_missing()
    assert (again.missing, len(storage.bytes)) == (CLUSTERS, before)
    assert again.record.standby is Standby.WAITING
    await again.inspect()
    await record_active(again, None)
    await again.adopt(0, bytearray(OLD[::-1]), CLUSTER)
    await again.close()
    assert await found(storage.bytes) == (Standby.REVOCABLE, CLUSTERS - 1)


async def test_after_a_power_cut_it_is_active_and_whole_or_in_standby_and_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = new_file(RecordingStorage)
    assert isinstance(storage, RecordingStorage)
    overlay = await activated(storage)
    await overlay.flush()
    begun = len(storage.log)
    await record_emptying("disk.raw", overlay)
    decided = len(storage.log)
    await overlay.empty()
    disk, rng = Disk(storage.start, storage.log), random.Random(3)
    results = set()
    for position in range(begun, len(storage.log) + 1):
        disk.advance(position)
        for cut in disk.cuts(12, rng):
            result = await found(disk.build(cut))
            assert position < decided or result[0] is not Standby.REVOCABLE
            results.add(result)
    assert results == {(Standby.REVOCABLE, CLUSTERS - 4), (Standby.WAITING, CLUSTERS)}


@pytest.mark.parametrize("kind", ["write", "resize", "barrier"])
async def test_after_a_kill_at_any_step_the_next_opening_empties_it(kind: str) -> None:
    for nth in (1, 2, 3):
        storage = new_file()
        overlay = await activated(storage)
        await record_emptying("disk.raw", overlay)
        storage.fail(kind, QedfsError("the disk does not answer"), nth=nth, forever=True)
        try:
            await overlay.empty()
        except QedfsError:
            assert await found(storage.bytes) == (Standby.WAITING, CLUSTERS)
        else:
            assert nth > 1


async def test_a_reader_without_locks_sees_no_cluster_of_what_is_being_emptied() -> None:
    storage = new_file()
    overlay = await activated(storage)
    await overlay.flush()
    await record_emptying("disk.raw", overlay)
    reader = await open_storage(MemoryStorage(storage.bytes, writable=False))
    await reader.count_missing()
    assert (reader.missing, reader.record.standby.waits) == (CLUSTERS, True)


async def test_a_guest_that_has_written_keeps_what_it_has() -> None:
    async def no_fill(cluster: int) -> bytes:
        raise AssertionError(cluster)

    overlay = await activated(new_file())
    overlay.times.may_move = False  # as the gate does
    await overlay.write(5 * CLUSTER, OLD, no_fill)
    with pytest.raises(QedfsError, match="a guest has written to it since it was activated; it stays active"):
        await record_emptying("disk.raw", overlay)
    assert overlay.record.standby is Standby.ACTIVE
    await overlay.close()


async def test_it_waits_for_reads_of_places_that_are_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    storage = new_file()
    overlay = await activated(storage)
    await record_emptying("disk.raw", overlay)
    [run] = await overlay.map(0, CLUSTER)
    emptied = trio.Event()

    async def empty_it() -> None:
        await overlay.empty()
        emptied.set()

    async with trio.open_nursery() as nursery:
        with overlay.reading():
            nursery.start_soon(empty_it)
            await trio.sleep(10)
            assert not emptied.is_set()
            assert [run.offset for run in await overlay.map(0, CLUSTER)] == [MISSING]
            view = memoryview(bytearray(CLUSTER))
            await overlay.read_data(run.offset, view)
            assert view == OLD
        with trio.fail_after(1):
            await emptied.wait()


async def test_who_still_has_the_old_object_cannot_write(autojump_clock: trio.testing.MockClock) -> None:
    storage = new_file()
    overlay = await activated(storage)
    await record_emptying("disk.raw", overlay)
    await overlay.empty()
    after = bytes(storage.bytes)
    with pytest.raises(ReadOnlyOverlay):
        await record_active(overlay, None)
    with pytest.raises(QedfsError):
        await overlay.commit()
    await overlay.inspect()
    assert bytes(storage.bytes) == after


async def test_clusters_that_the_backing_has_too_are_dropped_and_the_session_has_ended_in_order() -> None:
    storage = new_file()
    overlay = await open_storage(storage)
    await overlay.adopt(0, bytearray(OLD), CLUSTER)
    await overlay.flush()
    await overlay.drop_committed()
    assert storage.closed
    assert bytes(storage.bytes[4096 * 2 :]) == bytes(len(new_file().bytes) - 4096 * 2)
    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    assert (again.clusters.all_missing(0, CLUSTERS), again.record.session) == (True, "")


@pytest.mark.parametrize("kind", ["write", "barrier", "resize"])
async def test_a_disk_that_fails_while_they_are_dropped_leaves_a_file_that_opens(kind: str) -> None:
    storage = new_file()
    overlay = await open_storage(storage)
    await overlay.adopt(0, bytearray(OLD), CLUSTER)
    await overlay.flush()
    storage.fail(kind, QedfsError("the disk is broken"))
    with pytest.raises(QedfsError, match="broken"):
        await overlay.drop_committed()
    assert storage.closed
    again = await open_storage(MemoryStorage(storage.bytes))
    data = bytearray(CLUSTER)
    for run in await again.map(0, CLUSTER):
        if run.offset != MISSING:
            await again.read_data(run.offset, memoryview(data))
            assert data == OLD
