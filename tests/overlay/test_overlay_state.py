"""What an open overlay tells of itself follows what is done to it."""

from __future__ import annotations

import pytest

from qedfs.errors import BadOverlay, QedfsError, ReadOnlyOverlay
from qedfs.overlay.open import open_storage
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty

CLUSTER = 4096


async def test_a_write_is_uncommitted_until_a_commit() -> None:
    storage = MemoryStorage(empty(backing=b"").data)
    overlay = await open_storage(storage)
    assert (overlay.image_size, overlay.cluster_size, overlay.backing) == (1 << 20, CLUSTER, None)
    assert (overlay.commit_pending, overlay.uncommitted_bytes, overlay.missing) == (False, 0, None)
    await overlay.count_missing()
    whole = overlay.missing
    await overlay.adopt(0, bytearray(b"x" * 2 * CLUSTER), 2 * CLUSTER)
    assert whole is not None
    assert (overlay.commit_pending, overlay.uncommitted_bytes, overlay.missing) == (True, 2 * CLUSTER, whole - 2)
    before = overlay.barriers
    await overlay.commit()
    assert (overlay.commit_pending, overlay.uncommitted_bytes, overlay.barriers) == (False, 0, before + 1)
    assert overlay.file_size == len(storage.bytes) == overlay.file_status().st_size


async def test_a_discard_leaves_space_to_give_back() -> None:
    overlay = await open_storage(MemoryStorage(empty().data))
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    await overlay.flush()
    before = overlay.discards
    assert not overlay.has_space_to_give_back
    assert await overlay.discard(0, 2) == 1
    assert (overlay.discards, overlay.discarded) == (before + 1, 1)
    await overlay.commit_and_give_back()
    assert not overlay.has_space_to_give_back


async def test_a_failed_barrier_shows_in_every_answer_that_it_concerns() -> None:
    storage = MemoryStorage(empty().data)
    overlay = await open_storage(storage)
    await overlay.count_missing()
    epoch = overlay.epoch
    assert (overlay.writable, overlay.failure, overlay.damage, overlay.full) == (True, None, None, None)
    storage.fail("barrier", QedfsError("EIO"))
    with pytest.raises(ReadOnlyOverlay):
        await overlay.change_record(lambda record: record)
    assert (overlay.writable, overlay.missing, overlay.epoch != epoch) == (False, None, True)
    assert isinstance(overlay.failure, ReadOnlyOverlay)
    assert overlay.damage is None


async def test_a_file_that_was_cut_is_damaged() -> None:
    storage = MemoryStorage(empty().data)
    overlay = await open_storage(storage)
    await overlay.write(0, b"x" * CLUSTER, no_fill)
    await overlay.flush()
    del storage.bytes[-512:]
    with pytest.raises(BadOverlay):
        await overlay.inspect()
    assert isinstance(overlay.damage, BadOverlay)
    assert not overlay.seems_unchanged
