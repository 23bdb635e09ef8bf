"""The slices of tables in memory: which are loaded, which stay, and what others may change meanwhile."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import BadOverlay
from qedfs.format.tables import ZERO
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.harness.hang import HANG_SECONDS
from tests.overlay.guest import no_fill
from tests.overlay.images import SPAN, empty, many_tables

CLUSTER = 4096


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight slices to a table of 512 entries."""
    monkeypatch.setattr("qedfs.overlay.table_slices.SLICE_ENTRIES", 64)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("how", ["write", "write in a thread", "adopt", "adopt_zeros"])
async def test_what_crosses_slices_of_a_table_that_is_not_there_yet_is_taken(how: str) -> None:
    first, count = 60, 150 if how == "write in a thread" else 8
    size = count * CLUSTER
    storage = MemoryStorage(empty().data, seed=1)
    overlay = await open_storage(storage)
    content = b"\0" if how == "adopt_zeros" else b"x"
    match how:
        case "adopt":
            await overlay.adopt(first * CLUSTER, bytearray(content * size), size)
        case "adopt_zeros":
            await overlay.adopt_zeros(first, count)
        case _:
            await overlay.write(first * CLUSTER, content * size, no_fill)
    for look in (overlay, await reopened(overlay, storage)):
        (run,) = await look.map(first * CLUSTER, size)
        assert (run.offset > ZERO) == (how != "adopt_zeros")
        assert await look.clusters.next_missing(first, 1) == (first + count, 1)


async def reopened(overlay: Overlay, storage: MemoryStorage) -> Overlay:
    await overlay.flush()
    return await open_storage(MemoryStorage(storage.bytes, writable=False))


async def test_a_request_larger_than_the_cache_is_answered() -> None:
    overlay = await open_storage(MemoryStorage(many_tables(4).data, writable=False))
    overlay.tables._cache_slices = 1
    with trio.fail_after(HANG_SECONDS):
        assert len(await overlay.map(0, 4 * SPAN)) == 8


@pytest.mark.parametrize("seed", range(10))
async def test_a_slice_stays_while_a_thread_writes_its_cluster(seed: int) -> None:
    storage = MemoryStorage(many_tables(6).data, seed=seed)
    overlay = await open_storage(storage)
    overlay.tables._cache_slices = 1

    async def browse() -> None:
        for index in [*range(6)] * 3:
            await overlay.map(index * SPAN, 512)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(browse)
        nursery.start_soon(overlay.adopt, CLUSTER, bytearray(b"x" * CLUSTER), CLUSTER)
    assert (await overlay.map(CLUSTER, CLUSTER))[0].offset > ZERO


async def test_a_slow_read_of_a_slice_does_not_bring_back_what_it_was() -> None:
    """While it is read somebody else loads the slice, changes it and commits, and it is evicted again."""
    for seed in range(60):
        storage = MemoryStorage(many_tables(6).data, seed=seed)
        overlay = await open_storage(storage)
        overlay.tables._cache_slices = 1

        async def change(overlay: Overlay = overlay) -> None:
            await overlay.adopt(CLUSTER, bytearray(b"x" * CLUSTER), CLUSTER)
            await overlay.commit()
            await overlay.map(SPAN, 512)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlay.map, 0, 512)
            nursery.start_soon(overlay.count_missing)
            nursery.start_soon(change)
            nursery.start_soon(overlay.map, 0, 512)
        assert (await overlay.map(CLUSTER, CLUSTER))[0].offset > ZERO
        assert overlay.missing == 6 * 511 - 1


async def test_a_bad_table_is_refused_and_the_rest_is_served() -> None:
    built = many_tables(2)
    built.put_u64(built.header.l1_table_offset + 8, 0x1000)
    overlay = await open_storage(MemoryStorage(built.data, writable=False))
    with pytest.raises(BadOverlay, match="L2 table at 0x1000 is not inside the file; run qedfs check"):
        await overlay.map(SPAN, 512)
    assert len(await overlay.map(0, SPAN)) == 2
