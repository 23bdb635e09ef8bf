"""A flush of data in place: one barrier in a thread that is not waited for, none if nothing was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import BadOverlay, QedfsError, ReadOnlyOverlay
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty

CLUSTER = 4096


class Flushes:
    """The short flushes of an overlay, and how they have ended."""

    def __init__(self, overlay: Overlay) -> None:
        self.ended: list[Exception | None] = []
        self._overlay = overlay

    def begin(self) -> bool:
        return self._overlay.flush_now(self.ended.append)

    async def came(self, count: int) -> None:
        while len(self.ended) < count:
            await trio.lowlevel.checkpoint()


async def in_place(seed: int | None = None) -> tuple[MemoryStorage, Overlay, Flushes]:
    """An overlay in which cluster 0 has a durable entry, and bytes that are not durable."""
    storage = MemoryStorage(empty().data, seed=seed)
    overlay = await open_storage(storage)
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    await overlay.flush()
    await overlay.write(0, b"y" * 512, no_fill)
    return storage, overlay, Flushes(overlay)


async def test_the_end_of_the_commits_waits_for_the_thread_of_a_short_flush() -> None:
    """The file is closed next: its number may be that of another overlay by then."""
    _, overlay, flushes = await in_place()
    assert flushes.begin()
    async with overlay.committer.ended():
        assert flushes.ended == [None]
        overlay.close_now()


async def test_a_flush_of_data_in_place_is_one_barrier_and_the_next_one_none() -> None:
    _, overlay, flushes = await in_place()
    before = overlay.barriers
    assert flushes.begin()
    await flushes.came(1)
    assert overlay.barriers == before + 1
    assert flushes.begin()
    assert flushes.ended == [None, None]
    await overlay.flush()
    assert overlay.barriers == before + 1
    await overlay.write(0, b"z" * 512, no_fill)
    await overlay.flush()
    assert overlay.barriers == before + 2


async def test_a_short_flush_leaves_entries_and_running_barriers_to_the_long_one(tmp_path: Path) -> None:
    storage = MemoryStorage(empty().data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    flushes = Flushes(overlay)
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    assert not flushes.begin()
    await overlay.flush()
    await overlay.write(0, b"y" * 512, no_fill)
    assert flushes.begin()
    assert not flushes.begin()
    await overlay.flush()
    assert flushes.ended == [None]


@pytest.mark.parametrize("seed", range(10))
async def test_what_is_written_beside_a_short_flush_needs_another(seed: int) -> None:
    storage, overlay, flushes = await in_place(seed)
    before = overlay.barriers
    assert flushes.begin()
    while overlay.barriers == before:
        await trio.lowlevel.checkpoint()
    await overlay.write(0, b"z" * 512, no_fill)  # the barrier has begun, or is about to
    await flushes.came(1)
    if storage.unsynced:
        assert flushes.begin()
        await flushes.came(2)
    assert flushes.ended in ([None], [None, None])
    assert not storage.unsynced


async def test_a_short_flush_that_fails_stops_the_overlay_and_is_told_once() -> None:
    storage, overlay, flushes = await in_place()
    storage.fail("barrier", QedfsError("EIO"))
    epoch, refreshes = overlay.epoch, storage.operations["refresh"]
    assert flushes.begin()
    await flushes.came(1)
    assert isinstance(flushes.ended[0], ReadOnlyOverlay)
    assert storage.operations["refresh"] == refreshes + 1
    assert overlay.epoch != epoch
    assert not flushes.begin()
    with pytest.raises(ReadOnlyOverlay, match="EIO"):
        await overlay.flush()
    assert len(flushes.ended) == 1


async def test_a_short_flush_of_a_truncated_file_fails() -> None:
    storage, overlay, flushes = await in_place()
    del storage.bytes[-512:]
    assert flushes.begin()
    await flushes.came(1)
    assert isinstance(flushes.ended[0], BadOverlay)
    assert overlay.failure is None


@pytest.mark.parametrize("seed", range(5))
async def test_a_close_waits_for_a_short_flush(seed: int) -> None:
    """Otherwise its barrier would be that of a descriptor that is closed, or is another file by then."""
    storage, overlay, flushes = await in_place(seed)
    assert flushes.begin()
    await overlay.close()
    assert flushes.ended == [None]
    assert storage.closed
