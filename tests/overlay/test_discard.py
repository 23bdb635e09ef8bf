"""Discards of whole clusters: what they change, and what a killed session brings back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay import discard as discard_module
from qedfs.overlay import journal as journal_module
from qedfs.overlay.journal import Journal, run_count, zero_run
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty, filled

CLUSTER = 4096


async def entries(overlay: Overlay, *clusters: int) -> list[int]:
    for cluster in clusters:
        await overlay.load(cluster * CLUSTER, 1)
    return [overlay.clusters.entry(cluster) for cluster in clusters]


async def again(storage: MemoryStorage, folder: Path | None = None) -> Overlay:
    """What the next session finds after a kill."""
    left = MemoryStorage(storage.bytes, name="disk")
    return await open_storage(left, journal_folder=folder)


def test_a_run_of_zeros_is_no_offset() -> None:
    assert [run_count(zero_run(count)) for count in (1, 2, 4096)] == [1, 2, 4096]
    assert [run_count(offset) for offset in (0, 4096, 1 << 40)] == [0, 0, 0]


async def test_all_kinds_of_clusters_become_zeros() -> None:
    overlay = await open_storage(MemoryStorage(filled({3: b"x" * CLUSTER, 4: ZERO}).data))
    await overlay.count_missing()
    before = overlay.missing
    assert await overlay.discard(2, 4) == 2
    assert await entries(overlay, 1, 2, 3, 4, 5, 6) == [MISSING, ZERO, ZERO, ZERO, ZERO, MISSING]
    assert before is not None
    assert overlay.missing == before - 2
    assert await overlay.discard(2, 4) == 0
    await overlay.flush()
    assert await entries(await again(overlay.storage), 2, 3) == [ZERO, ZERO]  # type: ignore[arg-type]


async def test_an_adoption_does_not_undo_it() -> None:
    overlay = await open_storage(MemoryStorage(empty().data))
    await overlay.discard(0, 2)
    assert await overlay.adopt(0, bytearray(b"x" * 3 * CLUSTER), 3 * CLUSTER) == CLUSTER
    assert await entries(overlay, 0, 1) == [ZERO, ZERO]


async def test_without_a_backing_only_data_is_discarded_and_no_table_is_made() -> None:
    built = filled({3: b"x" * CLUSTER}, image_size=1 << 30, backing=b"")
    overlay = await open_storage(MemoryStorage(built.data))
    assert await overlay.discard(0, overlay.geometry.clusters) == 0
    assert await entries(overlay, 2, 3) == [MISSING, ZERO]
    assert sum(overlay.has_table(cluster) for cluster in range(0, overlay.geometry.clusters, 512)) == 1


async def test_the_last_cluster_may_be_no_whole_one() -> None:
    overlay = await open_storage(MemoryStorage(empty(image_size=3 * CLUSTER + 512).data))
    assert await overlay.discard(2, 2) == 2
    assert await entries(overlay, 1, 2, 3) == [MISSING, ZERO, ZERO]


@pytest.mark.parametrize("at_once", [1, 3, 4096])
async def test_a_killed_session_brings_it_back_in_its_order_among_writes(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discard_module, "CLUSTERS_AT_ONCE", at_once)
    storage = MemoryStorage(empty().data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    for cluster in (1, 2, 3):
        await overlay.write(cluster * CLUSTER, b"a" * CLUSTER, no_fill)
    await overlay.discard(0, 5)
    await overlay.write(2 * CLUSTER, b"b" * CLUSTER, no_fill)
    found = await again(storage, tmp_path)
    assert await entries(found, 0, 1, 3, 4, 5) == [ZERO, ZERO, ZERO, ZERO, MISSING]
    view = memoryview(bytearray(CLUSTER))
    await found.read_data((await entries(found, 2))[0], view)
    assert bytes(view) == b"b" * CLUSTER


async def test_a_killed_session_makes_no_tables_without_a_backing(tmp_path: Path) -> None:
    storage = MemoryStorage(filled({3: b"x" * CLUSTER}, image_size=1 << 30, backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.discard(0, overlay.geometry.clusters)
    found = await again(storage, tmp_path)
    assert await entries(found, 3) == [ZERO]
    assert sum(found.has_table(cluster) for cluster in range(0, found.geometry.clusters, 512)) == 1


async def test_a_discard_that_begins_in_missing_clusters_does_not_cost_the_writes_after_it(tmp_path: Path) -> None:
    """Without a backing they stay missing, so the journal's witness of the discard must not begin with one of them."""
    storage = MemoryStorage(filled({3: b"x" * CLUSTER}, backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.discard(0, 5)
    await overlay.commit()
    await overlay.write(7 * CLUSTER, b"w" * CLUSTER, no_fill)
    found = await again(storage, tmp_path)
    assert found.journal_remark == ""
    assert (await entries(found, 7))[0] > ZERO


@pytest.mark.expect_log("writes to new clusters wait for a commit")
async def test_a_journal_that_takes_nothing_more_does_not_outlive_a_discard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its entry of an earlier write would come back after a kill, and nothing would contradict it."""
    storage = MemoryStorage(empty().data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.write(CLUSTER, b"a" * CLUSTER, no_fill)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    monkeypatch.setattr(Journal, "landed", lambda *_: None)  # the tmpfs has no room for a new file either
    await overlay.discard(0, 4)
    assert os.listdir(tmp_path) == []
    assert await entries(await again(storage, tmp_path), 0, 1, 2, 3) == [ZERO] * 4


def test_the_journal_of_an_older_qedfs_is_read() -> None:
    assert journal_module._MAGICS[1:] == (b"qedfsj\0\4", b"qedfsj\0\3", b"qedfsj\0\2")
