"""The image's own times: they move with a guest's writes, not with its overlay file, and last."""

from __future__ import annotations

import dataclasses

import pytest

from qedfs.errors import NoSpace, QedfsError
from qedfs.format.header import UNTOUCHED
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from tests.fakes.storage import BarrierBegun, MemoryStorage, RecordingStorage, Written
from tests.overlay.images import empty, filled

CLUSTER = 4096
FILE = 10**18  # the mtime of every file in memory


async def no_fill(cluster: int) -> bytes:
    return bytes(CLUSTER)


def times(overlay: Overlay) -> tuple[int, int]:
    return overlay.times.modified_ns, overlay.times.changed_ns


async def again(overlay: Overlay, *, writable: bool = True, file_ns: int = FILE + 5) -> Overlay:
    """The file as it is now, opened by another process, after something has moved its mtime."""
    assert isinstance(overlay.storage, MemoryStorage)
    storage = MemoryStorage(overlay.storage.bytes, writable=writable)
    storage.written_ns = file_ns
    return await open_storage(storage)


async def test_they_begin_as_those_of_the_file_and_stay() -> None:
    """Adoptions, a detach, a pin and remounts move the file's; so would a kill, which leaves it open."""
    overlay = await open_storage(MemoryStorage(empty().data))
    assert times(overlay) == (FILE, FILE)
    await overlay.adopt(0, bytearray(b"b" * CLUSTER), CLUSTER)
    await overlay.adopt_zeros(1, 255)
    await overlay.change_record(lambda record: dataclasses.replace(record, paused=True))
    await overlay.flush()
    killed = await again(overlay)
    assert times(killed) == (FILE, FILE)
    await killed.detach()
    await killed.close()
    for writable in (False, True):
        assert times(await again(killed, writable=writable)) == (FILE, FILE)


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_write_moves_them_and_a_clean_end_keeps_them(*, in_place: bool) -> None:
    overlay = await open_storage(MemoryStorage(filled({0: b"0"}).data))
    if in_place:
        assert not overlay.write_now(0, b"x")  # the first one goes the long way, which notes it
    await overlay.write(0 if in_place else CLUSTER, b"x", no_fill)
    first = times(overlay)
    assert first[0] == first[1] > FILE
    assert overlay.write_now(1, b"y")
    last = times(overlay)
    assert last > first
    await overlay.close()
    for writable in (False, True, True):
        overlay = await again(overlay, writable=writable)
        assert times(overlay) == last
        await overlay.close()


async def test_a_kill_after_a_write_leaves_a_later_time() -> None:
    """When the last write was is not known. A reader finds the same one each time, which is not the one from before."""
    overlay = await open_storage(MemoryStorage(filled({0: b"0"}).data))
    await overlay.write(0, b"x", no_fill)
    last = times(overlay)
    for _ in range(2):
        assert times(await again(overlay, writable=False, file_ns=last[0] + 7)) == (last[0] + 7, last[0] + 7)
    after = await again(overlay)
    assert times(after) > last
    assert times(await again(after)) == times(after)


@pytest.mark.parametrize(("wanted", "kept"), [(-5, -5), (0, 0), (1 << 80, 1 << 62), (-(1 << 63), -(1 << 62))])
async def test_what_a_user_sets_is_kept(wanted: int, kept: int) -> None:
    """Or the nearest time that the record can hold: it must not be lost for that."""
    overlay = await open_storage(MemoryStorage(empty().data))
    await overlay.set_modified(wanted)
    assert overlay.times.modified_ns == kept
    assert overlay.times.changed_ns > FILE
    await overlay.close()
    assert times(await again(overlay)) == times(overlay)


async def test_after_another_program_they_are_those_of_the_file() -> None:
    overlay = await open_storage(MemoryStorage(filled({0: b"0"}).data))
    await overlay.write(0, b"x", no_fill)
    await overlay.close()
    assert isinstance(overlay.storage, MemoryStorage)
    header, _ = read_header(MemoryStorage(overlay.storage.bytes))
    cleared = dataclasses.replace(header, autoclear_features=header.autoclear_features & ~UNTOUCHED)
    overlay.storage.bytes[:64] = cleared.encode()
    assert times(await again(overlay)) == (FILE + 5, FILE + 5)


async def test_an_overlay_without_room_for_a_record_has_those_of_its_file() -> None:
    built = empty(backing=b"n" * 1000)
    built.replace(header_size=1)
    overlay = await open_storage(MemoryStorage(built.data))
    assert not overlay.record.session
    await overlay.write(0, b"x", no_fill)
    assert times(overlay) > (FILE, FILE)
    await overlay.close()
    assert times(await again(overlay)) == (FILE + 5, FILE + 5)


async def test_they_cost_no_barrier_and_one_write_a_session() -> None:
    """The note that a guest writes comes before its bytes; the end of a session is noted in any case."""
    storage = RecordingStorage(filled({0: b"0"}).data)
    overlay = await open_storage(storage)
    begun = len(storage.log)
    await overlay.write(0, b"xyz", no_fill)
    note, data = storage.log[begun:]
    assert isinstance(note, Written)
    assert b'"written":true' in note.data
    assert isinstance(data, Written)
    assert data.data == b"xyz"
    await overlay.write(0, b"z", no_fill)
    assert overlay.write_now(0, b"z")
    assert not any(isinstance(entry, BarrierBegun) for entry in storage.log[begun:])
    assert len(storage.log) == begun + 4
    await overlay.flush()
    assert sum(isinstance(entry, BarrierBegun) for entry in storage.log[begun:]) == 1


async def test_a_full_disk_keeps_no_write_from_its_place() -> None:
    storage = MemoryStorage(filled({0: b"0"}).data)
    overlay = await open_storage(storage)
    storage.fail("write", NoSpace("full"), wrote=0)
    await overlay.write(0, b"x", no_fill)
    assert not overlay.times.may_move
    await overlay.write(0, b"y", no_fill)
    assert overlay.times.may_move


async def test_a_write_that_fails_moves_them_as_well() -> None:
    """Some of it may be there."""
    storage = MemoryStorage(filled({0: b"0"}).data)
    overlay = await open_storage(storage)
    await overlay.write(0, b"x", no_fill)
    before = times(overlay)
    storage.fail("write", QedfsError("EIO"), forever=True)
    with pytest.raises(QedfsError):
        overlay.write_now(0, bytes(1024))
    middle = times(overlay)
    assert middle > before
    with pytest.raises(QedfsError):
        await overlay.write(0, bytes(1024), no_fill)
    assert times(overlay) > middle


async def test_two_notes_without_a_barrier_are_never_behind_each_other() -> None:
    """They lie in the two slots: one power cut could tear both, and lose the pin."""
    storage = RecordingStorage(empty().data)
    overlay = await open_storage(storage)
    await overlay.write(0, b"x", no_fill)
    await overlay.change_record(lambda record: dataclasses.replace(record, paused=True))
    await overlay.close()
    storage = storage.reopened()
    overlay = await open_storage(storage)
    await overlay.write(0, b"x", no_fill)
    storage = storage.reopened()  # killed
    await (await open_storage(storage)).close()
    slots = [
        "slot" if isinstance(entry, Written) and entry.data.startswith(b"qedfs\0") else "barrier"
        for entry in storage.log
        if isinstance(entry, BarrierBegun) or (isinstance(entry, Written) and entry.data.startswith(b"qedfs\0"))
    ]
    assert "slot slot" not in " ".join(slots)
    assert slots.count("slot") == 8
    overlay = await open_storage(MemoryStorage(storage.bytes, writable=False))
    assert overlay.record.paused
