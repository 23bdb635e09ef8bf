"""A disk that is full at the open: the overlay is readable, with all that was left, and writable when there is room."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.header import UNTOUCHED
from qedfs.format.record import Pin, Record
from qedfs.image.image import Image
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header, read_record
from tests.fakes.source import FakeSource
from tests.fakes.storage import BarrierEnded, MemoryStorage, RecordingStorage, Written
from tests.overlay.guest import no_fill
from tests.overlay.images import empty, filled
from tests.served import CLUSTER as SERVED_CLUSTER
from tests.served import served, tended

CLUSTER = 4096
PIN = Pin("0" * 32, 4096, etag='"e"')


def pinned(record: Record) -> Record:
    return dataclasses.replace(record, pin=PIN)


async def first_byte(overlay: Overlay, cluster: int) -> bytes:
    (run,) = await overlay.map(cluster * CLUSTER, CLUSTER)
    byte = bytearray(1)
    await overlay.read_data(run.offset, memoryview(byte))
    return bytes(byte)


def journals(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def on_full_disk(data: bytes | bytearray, *, name: str = "") -> RecordingStorage:
    storage = RecordingStorage(data, name=name)
    storage.fail("write", NoSpace("full"), forever=True, wrote=0)
    return storage


async def test_what_is_local_is_read_and_the_rest_says_why_it_is_refused() -> None:
    storage = on_full_disk(filled({0: b"local"}).data)
    overlay = await open_storage(storage)
    assert str(overlay.full) == "full"
    assert await first_byte(overlay, 0) == b"l"
    requests: list[Callable[[], Awaitable[object]]] = [
        lambda: overlay.write(0, b"g", no_fill),
        lambda: overlay.write(CLUSTER, b"g" * CLUSTER, no_fill),
        lambda: overlay.adopt(CLUSTER, bytearray(b"b" * CLUSTER), CLUSTER),
        lambda: overlay.adopt_zeros(1, 1),
        overlay.detach,
    ]
    assert not overlay.write_now(0, b"g")
    for request in requests:
        with pytest.raises(NoSpace):
            await request()
    await overlay.flush()
    assert storage.bytes == storage.start
    await overlay.close()


async def test_the_session_begins_when_there_is_room(tmp_path: Path) -> None:
    storage = on_full_disk(filled({0: b"local"}).data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    assert journals(tmp_path) == []
    storage.mend()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.write, CLUSTER, b"g" * CLUSTER, no_fill)
        nursery.start_soon(overlay.adopt, 2 * CLUSTER, bytearray(b"b" * CLUSTER), CLUSTER)
    assert overlay.full is None
    assert overlay.write_now(0, b"now")
    (journal,) = journals(tmp_path)
    assert overlay.commit_pending

    # Killed: the journal is that of the session that the overlay carries.
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    assert [await first_byte(again, cluster) for cluster in range(3)] == [b"n", b"g", b"b"]
    assert journal not in journals(tmp_path)


async def test_a_record_that_had_to_wait_is_durable_before_anything_is_adopted() -> None:
    """Otherwise a power cut could leave clusters of a version that the overlay does not know."""
    storage = on_full_disk(empty().data)
    overlay = await open_storage(storage)
    await overlay.change_record(pinned)
    assert overlay.record.pin == PIN
    storage.mend()
    await overlay.adopt(0, bytearray(b"b" * CLUSTER), CLUSTER)
    records = [at for at, entry in enumerate(storage.log) if isinstance(entry, Written) and b"qedfs" in entry.data]
    data = next(at for at, entry in enumerate(storage.log) if isinstance(entry, Written) and b"bbbb" in entry.data)
    assert len(records) == 1
    assert any(isinstance(entry, BarrierEnded) for entry in storage.log[records[0] : data])
    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    assert again.record.pin == PIN


async def left_by_a_kill(folder: Path, backing: bytes = b"base.raw") -> bytearray:
    """An overlay whose last writes, to an L2 table that it does not have and to another, are in a journal only."""
    storage = MemoryStorage(filled({0: b"local"}, image_size=4 << 20, backing=backing).data, name="disk")
    overlay = await open_storage(storage, journal_folder=folder)
    await overlay.write(CLUSTER, b"a" * CLUSTER, no_fill)
    await overlay.write(2 << 20, b"c" * CLUSTER, no_fill)
    return storage.bytes


@pytest.mark.parametrize("kind", ["write", "resize"])
async def test_what_a_killed_session_left_is_there_and_stays(tmp_path: Path, kind: str) -> None:
    """Through openings on a full disk, until one finds room."""
    left = await left_by_a_kill(tmp_path)
    (journal,) = journals(tmp_path)
    for _ in range(2):
        storage = MemoryStorage(left, name="disk")
        storage.fail(kind, NoSpace("full"), forever=True, wrote=0)
        overlay = await open_storage(storage, journal_folder=tmp_path)
        assert [await first_byte(overlay, cluster) for cluster in (0, 1, 512)] == [b"l", b"a", b"c"]
        with pytest.raises(NoSpace):
            await overlay.write(0, b"g", no_fill)
        for request in (overlay.commit, overlay.flush, overlay.close):
            with pytest.raises(NoSpace):
                await request()
        assert journals(tmp_path) == [journal]
        left = storage.bytes

    storage = MemoryStorage(left, name="disk")
    storage.fail(kind, NoSpace("full"), forever=True, wrote=0)
    overlay = await open_storage(storage, journal_folder=tmp_path)
    storage.mend()
    await overlay.write(0, b"g", no_fill)
    assert journal not in journals(tmp_path)
    await overlay.close()
    assert journals(tmp_path) == []
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    assert [await first_byte(again, cluster) for cluster in (0, 1, 512)] == [b"g", b"a", b"c"]


async def test_a_barrier_that_fails_at_a_late_beginning_voids_what_was_left(tmp_path: Path) -> None:
    """As at the open: nobody knows whether the disk has the data that its entries lead to."""
    storage = MemoryStorage(await left_by_a_kill(tmp_path), name="disk")
    storage.fail("write", NoSpace("full"), forever=True, wrote=0)
    overlay = await open_storage(storage, journal_folder=tmp_path)
    storage.mend()
    storage.fail("barrier", QedfsError("cannot sync"), forever=True)
    with pytest.raises(ReadOnlyOverlay):
        await overlay.commit()
    assert not overlay.writable
    assert journals(tmp_path) == []
    with pytest.raises(ReadOnlyOverlay, match=r"cannot sync.*may be lost"):
        await overlay.close()


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
async def test_a_beginning_that_failed_half_way_is_made_again(tmp_path: Path, nth: int) -> None:
    """At the tables of what was left, at the record, at the header behind it."""
    storage = MemoryStorage(await left_by_a_kill(tmp_path), name="disk")
    header = read_header(storage)[0]
    bits = header.autoclear_features | 4  # of somebody else: the header has to be written
    storage.bytes[:64] = dataclasses.replace(header, autoclear_features=bits).encode()
    storage.fail("write", NoSpace("full"), nth=nth, wrote=0)
    overlay = await open_storage(storage, journal_folder=tmp_path)
    assert overlay.full is not None
    assert len(journals(tmp_path)) == 1

    await overlay.write(0, b"g", no_fill)
    assert read_header(storage)[0].autoclear_features == UNTOUCHED
    record = read_record(storage, header)
    assert record is not None
    assert journals(tmp_path) == [f"disk-{record.session}"]
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    assert [await first_byte(again, cluster) for cluster in (0, 1, 512)] == [b"g", b"a", b"c"]


async def test_a_complete_image_tells_of_a_full_disk_while_it_is_full(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    storage = MemoryStorage(await left_by_a_kill(tmp_path, b""), name="disk")
    storage.fail("write", NoSpace("full"), forever=True, wrote=0)
    image = Image("disk.raw", await open_storage(storage, journal_folder=tmp_path), None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tended, image)
        await trio.sleep(5)
        assert {str(trouble.error) for trouble in image.condition.troubles()} == {"full"}
        storage.mend()
        await trio.sleep(5)
        assert image.condition.troubles() == []
        assert image.overlay.full is None
        nursery.cancel_scope.cancel()
    await image.close()


async def test_readers_get_what_cannot_be_kept(autojump_clock: trio.testing.MockClock) -> None:
    content = bytes(range(1, 256)) * 1024
    built = empty(cluster_size=SERVED_CLUSTER, image_size=len(content) // 512 * 512, backing=b"http://fake/disk.raw")
    storage = on_full_disk(built.data)
    async with served(FakeSource(content), image_size=len(content) // 512 * 512, storage=storage) as image:
        assert bytes(await image.read(0, 512)) == content[:512]
        await trio.sleep(1)
        assert str(image.full) == "full"
        with pytest.raises(NoSpace):
            await image.write(0, b"g")
        assert image.overlay.missing == image.overlay.geometry.clusters

        storage.mend()
        await trio.sleep(10)
        assert bytes(await image.read(SERVED_CLUSTER, 512)) == content[SERVED_CLUSTER:][:512]
        await trio.sleep(1)
        assert image.full is None
        assert image.overlay.missing < image.overlay.geometry.clusters
        record = read_record(storage, read_header(storage)[0])
        assert record is not None
        assert record.pin is not None
