"""The record in the header clusters: what it survives, and what takes its trust away."""

from __future__ import annotations

import dataclasses

import pytest
import trio

from qedfs.format.header import UNTOUCHED
from qedfs.format.record import Pin
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from tests.fakes.storage import BarrierEnded, MemoryStorage, RecordingStorage
from tests.overlay.images import empty

CLUSTER = 4096
PIN = Pin("0" * 32, 4096, etag='"e"')


async def test_two_changes_at_once_do_not_lose_one_another() -> None:
    """Each is made from `overlay.record`: the second has to build on the first, although that is not durable yet."""
    for seed in range(20):
        storage = MemoryStorage(empty().data, seed=seed)
        overlay = await Overlay.open(storage)

        async def pin(overlay: Overlay = overlay) -> None:
            await overlay.store_record(dataclasses.replace(overlay.record, pin=PIN))

        async def pause(overlay: Overlay = overlay) -> None:
            await overlay.store_record(dataclasses.replace(overlay.record, paused=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pin)
            nursery.start_soon(pause)
        again = await Overlay.open(MemoryStorage(storage.bytes, writable=False))
        assert (again.record.pin, again.record.paused) == (PIN, True)


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
    overlay = await Overlay.open(storage)
    assert overlay.keeps_record == room
    assert read_header(storage)[0].autoclear_features == (UNTOUCHED if room else 0)
    if bits & 4:
        assert isinstance(storage.log[-1], BarrierEnded)


async def test_an_overlay_without_room_and_bits_is_opened_without_a_write() -> None:
    built = empty(backing=b"n" * 2000)
    built.replace(header_size=1, l1_table_offset=CLUSTER)
    storage = RecordingStorage(built.data[: 2 * CLUSTER])
    await Overlay.open(storage)
    assert storage.log == []
