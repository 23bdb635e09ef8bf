"""Another name for the backing of an overlay: what the file says after a power cut or a kill at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest

from qedfs.errors import QedfsError, UsageError
from qedfs.format.record import Pin, digest
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage, RecordingStorage
from tests.overlay.cuts import Disk
from tests.overlay.images import empty

OLD, NEW, LONG = "http://old/disk.raw", "nbd://new:10809/disk", "http://" + "h" * 1000
SAMPLES = "5:0123456789ab"


def pin_of(name: str) -> Pin:
    return Pin(digest(name), 4096, samples=SAMPLES)


async def started(cluster_size: int, name: str = OLD) -> RecordingStorage:
    """An overlay with a pin, whose log begins with the move."""
    storage = RecordingStorage(empty(cluster_size=cluster_size, backing=name.encode()).data)
    overlay = await open_storage(storage)
    await overlay.change_record(lambda record: dataclasses.replace(record, pin=pin_of(name)))
    await overlay.close()
    return RecordingStorage(bytes(storage.bytes))


def says(overlay: Overlay) -> tuple[str | None, bool]:
    """The name of the backing, and whether the pin counts for it and has its samples."""
    pin = overlay.record.pin
    valid = pin is not None and pin.backing == digest(overlay.backing or "") and pin.samples == SAMPLES
    return overlay.backing, valid


@pytest.mark.parametrize("cluster_size", [4096, 65536])
@pytest.mark.parametrize(("old", "new"), [(OLD, NEW), (LONG, NEW), (NEW, LONG)])
async def test_after_a_cut_it_names_one_of_both_with_a_pin(cluster_size: int, old: str, new: str) -> None:
    storage = await started(cluster_size, old)
    overlay = await open_storage(storage)
    begun = len(storage.log)
    await overlay.move_backing(new, pin_of(new))
    assert says(overlay) == (new, True)
    disk, rng, seen = Disk(storage.start, storage.log), random.Random(1), set()
    for position in range(begun, len(storage.log) + 1):
        disk.advance(position)
        for cut in disk.cuts(12, rng):
            again = await open_storage(MemoryStorage(disk.build(cut), writable=False))
            name, valid = says(again)
            assert name in (old, new)
            assert valid
            seen.add(name)
    assert seen == {old, new}
    # A kill leaves all that was written, in that order.
    await overlay.close()
    assert old.encode() not in storage.bytes[:cluster_size]  # it may hold a password
    assert says(await open_storage(MemoryStorage(storage.bytes))) == (new, True)


async def test_back_and_forth() -> None:
    storage = await started(4096)
    overlay = await open_storage(storage)
    for name in (NEW, OLD, LONG, NEW, LONG[:-1], OLD):
        await overlay.move_backing(name, pin_of(name))
        assert says(await open_storage(MemoryStorage(storage.bytes, writable=False))) == (name, True)


async def test_without_a_new_pin_the_old_one_counts() -> None:
    storage = await started(4096)
    overlay = await open_storage(storage)
    await overlay.move_backing(NEW, None)
    assert says(overlay) == (NEW, True)


@pytest.mark.parametrize("kind", ["write", "barrier"])
@pytest.mark.parametrize("nth", range(1, 6))
async def test_a_disk_that_fails(kind: str, nth: int) -> None:
    storage = MemoryStorage(bytes((await started(4096)).bytes))
    overlay = await open_storage(storage)
    storage.fail(kind, QedfsError("the disk is broken"), nth=nth)
    with contextlib.suppress(QedfsError):
        await overlay.move_backing(NEW, pin_of(NEW))
    name, valid = says(await open_storage(MemoryStorage(storage.bytes, writable=False)))
    assert name in (OLD, NEW)
    assert valid


async def test_an_overlay_that_was_detached_meanwhile_gets_no_backing() -> None:
    storage = await started(65536)
    overlay = await open_storage(storage)
    await overlay.detach()
    with pytest.raises(UsageError, match="complete"):
        await overlay.move_backing(NEW, pin_of(NEW))
    assert overlay.backing is None
    assert NEW.encode() not in storage.bytes
    await overlay.close()
    again = await open_storage(MemoryStorage(bytes(storage.bytes), writable=False))
    assert (again.backing, again.record.pin) == (None, None)
