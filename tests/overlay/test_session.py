"""The record in the header clusters: what it survives, and what takes its trust away."""

from __future__ import annotations

import dataclasses

import trio

from qedfs.format.record import Pin
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty

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
