"""The record in the header clusters: what it survives, and what takes its trust away."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable

import pytest
import trio

from qedfs.errors import NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.header import UNTOUCHED
from qedfs.format.record import Pin, Record, Standby
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import Session, read_header, read_record
from tests.fakes.storage import BarrierEnded, MemoryStorage, RecordingStorage, Resized, Written
from tests.overlay.cuts import Disk
from tests.overlay.guest import no_fill
from tests.overlay.images import empty
from tests.overlay.mutants import Mutant, mutated

CLUSTER = 4096
PIN = Pin("0" * 32, 4096, etag='"e"')


async def test_two_changes_at_once_do_not_lose_one_another() -> None:
    for seed in range(20):
        storage = MemoryStorage(empty().data, seed=seed)
        overlay = await open_storage(storage)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.change_record, pinned)
            nursery.start_soon(overlay.change_record, paused)
        assert await stored(storage) == (PIN, True)


def pinned(record: Record) -> Record:
    return dataclasses.replace(record, pin=PIN)


def paused(record: Record) -> Record:
    return dataclasses.replace(record, paused=True)


async def stored(storage: MemoryStorage) -> tuple[Pin | None, bool]:
    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    return again.record.pin, again.record.paused


class Attempt:
    """A change of the record, and what became of it."""

    def __init__(self, overlay: Overlay, change: Callable[[Record], Record]) -> None:
        self.error: QedfsError | None = None
        self._overlay = overlay
        self._change = change

    async def run(self) -> None:
        try:
            await self._overlay.change_record(self._change)
        except QedfsError as exc:
            self.error = exc


async def one_behind_the_other(storage: MemoryStorage) -> tuple[Overlay, Attempt, Attempt]:
    """A pin, and a pause that waits for it to be stored."""
    overlay = await open_storage(storage)
    first, second = Attempt(overlay, pinned), Attempt(overlay, paused)
    async with trio.open_nursery() as nursery, overlay._session.lock:
        nursery.start_soon(first.run)
        while overlay.record.pin is None:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(second.run)
        while not overlay.record.paused:
            await trio.lowlevel.checkpoint()
        assert overlay.record.pin == PIN
    return overlay, first, second


@pytest.mark.parametrize("seed", range(5))
async def test_a_change_that_failed_is_not_stored_by_the_next_one(seed: int) -> None:
    storage = MemoryStorage(empty().data, seed=seed)
    storage.fail("write", NoSpace("full"), nth=3)  # behind the record and the header of the open
    overlay, first, second = await one_behind_the_other(storage)
    assert isinstance(first.error, NoSpace)
    assert second.error is None
    assert (overlay.record.pin, overlay.record.paused) == (None, True)
    assert await stored(storage) == (None, True)


@pytest.mark.parametrize("seed", range(5))
async def test_a_change_behind_a_failed_barrier_is_refused(seed: int) -> None:
    storage = MemoryStorage(empty().data, seed=seed)
    storage.fail("barrier", QedfsError("cannot sync"), nth=2)
    overlay, first, second = await one_behind_the_other(storage)
    assert isinstance(first.error, ReadOnlyOverlay)
    assert isinstance(second.error, ReadOnlyOverlay)
    assert overlay.record.pin is None
    assert not overlay.record.paused


LONG = Pin("0" * 32, 4096, etag="e" * 500, last_modified="m" * 500)  # the record needs all sectors of its slot
OVERWRITE_RULES = (
    Mutant(
        "the current record is written over the new one",
        "session:Session._overwrite",
        "self._storage.write",
        "(lambda *_: None)",
    ),
    Mutant("before the answer, a barrier for it", "commit:Committer._take_back", "await self._read_again()", "pass"),
)


@pytest.mark.parametrize("rule", [None, *OVERWRITE_RULES], ids=lambda rule: "all" if rule is None else rule.rule)
async def test_after_a_failed_barrier_a_power_cut_leaves_the_record_of_before(rule: Mutant | None) -> None:
    """The disk may have the new record all the same, torn or whole, until the change has failed."""
    storage = RecordingStorage(empty().data)
    overlay = await open_storage(storage)
    await overlay.change_record(lambda record: dataclasses.replace(record, pin=LONG, standby=Standby.WAITING))
    begun = len(storage.log)
    storage.fail("barrier", QedfsError("cannot sync: Input/output error"))
    with contextlib.nullcontext() if rule is None else mutated(rule), pytest.raises(ReadOnlyOverlay):
        await overlay.change_record(lambda record: dataclasses.replace(record, standby=Standby.REVOCABLE))
    disk, wrong = Disk(storage.start, storage.log), []
    for position in range(begun, len(storage.log) + 1):
        disk.advance(position)
        for cut in disk.cuts(64, random.Random(position)):
            image = disk.build(cut)
            record = (await open_storage(MemoryStorage(image, writable=False))).record
            if record.pin != LONG or (position == len(storage.log) and record.standby is not Standby.WAITING):
                wrong.append((position, record.standby))
    assert bool(wrong) == (rule is not None), wrong
    # A kill leaves all that was written, in that order, and the next session goes on with it.
    if rule is None:
        again = MemoryStorage(storage.bytes)
        overlay = await open_storage(again)
        assert overlay.record.standby is Standby.WAITING
        await overlay.change_record(paused)
        assert await stored(again) == (LONG, True)


@pytest.mark.parametrize("bits", [4, UNTOUCHED, UNTOUCHED | 4])
@pytest.mark.parametrize("room", [True, False])
async def test_autoclear_bits_of_others_are_cleared_before_the_first_write(room: bool, bits: int) -> None:
    """A long backing name in one 4 KiB header cluster leaves no room for a record."""
    built = empty(backing=b"n" * (100 if room else 2000))
    if not room:
        built.replace(header_size=1, l1_table_offset=CLUSTER)
        del built.data[2 * CLUSTER :]
    built.replace(autoclear_features=bits)
    storage = RecordingStorage(built.data)
    overlay = await open_storage(storage)
    assert bool(overlay.record.session) == room
    assert read_header(storage)[0].autoclear_features == (UNTOUCHED if room else 0)
    if bits & 4:
        assert isinstance(storage.log[-1], BarrierEnded)


async def test_an_overlay_without_room_and_bits_is_opened_without_a_write() -> None:
    built = empty(backing=b"n" * 2000)
    built.replace(header_size=1, l1_table_offset=CLUSTER)
    storage = RecordingStorage(built.data[: 2 * CLUSTER])
    await open_storage(storage)
    assert not any(isinstance(entry, Written | Resized) for entry in storage.log)


async def test_the_end_of_a_session_is_noted_after_its_last_barrier() -> None:
    """Before it, the note would vouch for pages that the disk may not take."""
    storage = RecordingStorage(empty().data)
    overlay = await open_storage(storage)
    await overlay.write(0, b"g" * CLUSTER, no_fill)
    assert not ended(storage)
    await overlay.close()
    assert ended(storage)
    assert isinstance(storage.log[-1], Written)
    assert isinstance(storage.log[-2], BarrierEnded)


async def test_a_session_whose_barrier_failed_does_not_end_in_order() -> None:
    storage = MemoryStorage(empty().data)
    overlay = await open_storage(storage)
    await overlay.write(0, b"g" * CLUSTER, no_fill)
    storage.fail("barrier", QedfsError("EIO"))
    with pytest.raises(ReadOnlyOverlay):
        await overlay.close()
    assert not ended(storage)


def ended(storage: MemoryStorage) -> bool:
    again = MemoryStorage(storage.bytes)
    header, _ = read_header(again)
    return Session(again, header, read_record(again, header)).ended_in_order


@pytest.mark.parametrize("cluster_size", [4096, 65536])
async def test_a_complete_overlay_keeps_nothing_of_the_name_of_its_backing(cluster_size: int) -> None:
    """It may hold a password, and a complete overlay is handed on. Its record stays."""
    name = b"http://user:hunter2@host/disk.raw?token=hunter2"
    storage = MemoryStorage(empty(cluster_size=cluster_size, image_size=1 << 20, backing=name).data)
    overlay = await open_storage(storage)
    await overlay.change_record(pinned)
    assert b"hunter2" in storage.bytes
    await overlay.adopt_zeros(0, overlay.clusters.geometry.clusters)
    await overlay.detach()
    await overlay.close()
    for word in (b"hunter2", b"host", b"disk.raw"):
        assert word not in storage.bytes
    header, backing = read_header(MemoryStorage(storage.bytes))
    assert (header.has_backing, backing) == (False, None)
    assert read_record(MemoryStorage(storage.bytes), header) is not None


SECRET = b"http://user:hunter2@host/disk.raw"


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_detach_that_found_no_space_is_finished_by_the_next_one(nth: int) -> None:
    """The header, the name and the record: some file systems never overwrite in place, and need space for each."""
    storage = MemoryStorage(empty(image_size=1 << 20, backing=SECRET).data)
    overlay = await open_storage(storage)
    await overlay.change_record(pinned)
    await overlay.adopt_zeros(0, overlay.clusters.geometry.clusters)
    await overlay.flush()
    storage.fail("write", NoSpace("full"), nth=nth, wrote=0)
    with pytest.raises(NoSpace):
        await overlay.detach()
    await overlay.detach()
    assert overlay.backing is None
    assert b"hunter2" not in storage.bytes
    assert overlay.record.pin is None
    await overlay.close()
    assert await stored(storage) == (None, False)


@pytest.mark.parametrize("room", [True, False])
async def test_a_detach_that_was_killed_before_the_zeros_is_finished_at_the_next_opening(room: bool) -> None:
    """For writing only, and not before the header is on the disk: zeros under a header that names a backing lose it."""
    built = empty(backing=SECRET)
    if not room:
        built.replace(header_size=1, l1_table_offset=CLUSTER)
        del built.data[2 * CLUSTER :]
    storage = RecordingStorage(built.data)
    overlay = await open_storage(storage)
    await overlay.adopt_zeros(0, overlay.clusters.geometry.clusters)
    await overlay.flush()
    storage.fail("write", NoSpace("stands for a kill"), nth=2, wrote=0)
    with pytest.raises(NoSpace):
        await overlay.detach()
    left = bytes(storage.bytes)
    assert not read_header(MemoryStorage(left))[0].has_backing
    assert b"hunter2" in left
    reader = MemoryStorage(left, writable=False)
    await open_storage(reader)
    assert reader.bytes == left
    full = MemoryStorage(left)
    full.fail("write", NoSpace("full"), wrote=0)
    await open_storage(full)  # it can be used, and the next opening tries again
    again = RecordingStorage(left)
    await open_storage(again)
    assert b"hunter2" not in again.bytes
    zeroed = next(at for at, step in enumerate(again.log) if isinstance(step, Written) and step.offset == 64)
    assert isinstance(again.log[zeroed - 1], BarrierEnded)
    header, _ = read_header(MemoryStorage(again.bytes))
    assert read_record(MemoryStorage(again.bytes), header) is not None or not room
    clean = RecordingStorage(bytes(again.bytes))
    await open_storage(clean)
    assert [step for step in clean.log if isinstance(step, Written) and step.offset == 64] == []


@pytest.mark.parametrize("room", [True, False])
async def test_a_detach_ends_with_a_barrier_for_the_overwritten_name(room: bool) -> None:
    """Also without room for a record, whose barrier would cover it: the user may hand the overlay on now."""
    built = empty(backing=SECRET.ljust(100 if room else 2000, b"n"))
    if not room:
        built.replace(header_size=1, l1_table_offset=CLUSTER)
        del built.data[2 * CLUSTER :]
    storage = RecordingStorage(built.data)
    overlay = await open_storage(storage)
    await overlay.adopt_zeros(0, overlay.clusters.geometry.clusters)
    await overlay.detach()
    assert b"hunter2" not in storage.bytes
    assert isinstance(storage.log[-1], BarrierEnded)
    await overlay.close()


@pytest.mark.parametrize("zeros", [len(SECRET), 10])
async def test_an_overlay_that_is_detached_while_it_is_read_has_no_backing(zeros: int) -> None:
    """By a command, which needs no lock. Between its reads of header and name a mount drops the one, then the other."""
    storage = MemoryStorage(empty(image_size=1 << 20, backing=SECRET).data)
    overlay = await open_storage(storage)
    await overlay.adopt_zeros(0, overlay.clusters.geometry.clusters)
    await overlay.flush()
    reader = MemoryStorage(storage.bytes)
    await overlay.detach()

    def detach() -> None:
        if reader.operations["read"] == 1:
            reader.bytes[:] = storage.bytes
            reader.bytes[64 + zeros : 64 + len(SECRET)] = SECRET[zeros:]

    reader.before_step = detach
    header, backing = read_header(reader)
    assert (header.has_backing, backing) == (False, None)
