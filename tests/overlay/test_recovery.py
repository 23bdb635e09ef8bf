"""What a killed session left, and who gets it: the overlay, not its copies.

A copy carries the session of its original. A snapshot of the file system has even its inode number, on another device;
an older state that was put back in place has the device too.
"""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from qedfs.cli.commands.map import whole_map
from qedfs.errors import NoMemory, NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.tables import MISSING
from qedfs.host import memory_pool
from qedfs.overlay.clustermap import Run
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay, open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty
from tests.overlay.scenario import read_all

CLUSTER = 4096
ELSEWHERE = 5  # the device of a snapshot


async def opened(image: bytes | bytearray, folder: Path, *, device: int = 0) -> tuple[Overlay, MemoryStorage]:
    storage = MemoryStorage(image, name="disk")
    storage.device_number = device
    return await open_storage(storage, journal_folder=folder), storage


async def write(overlay: Overlay, clusters: str) -> None:
    """Write these clusters, each full of its own digit."""
    for digit in clusters:
        await overlay.write(int(digit) * CLUSTER, digit.encode() * CLUSTER, no_fill)


async def content(overlay: Overlay) -> str:
    """The digits of the clusters that are not zeros. Without a backing missing clusters are."""
    image = await read_all(overlay, bytes(overlay.image_size))
    found = [image[pos : pos + CLUSTER] for pos in range(0, len(image), CLUSTER)]
    assert all(cluster.count(cluster[:1]) == CLUSTER for cluster in found)
    return "".join(cluster[:1].decode() for cluster in found if any(cluster))


def die(overlay: Overlay) -> None:
    """What is left of a killed process: the journal's file, but nobody holds it."""
    assert overlay._journal.takes_entries
    overlay._journal.close(remove=False)


def new() -> bytearray:
    return empty(backing=b"").data


async def test_a_snapshot_leaves_the_journal_of_the_running_overlay_alone(tmp_path: Path) -> None:
    original, storage = await opened(new(), tmp_path)
    await write(original, "9")
    await original.commit()
    snapshot, _ = await opened(storage.bytes, tmp_path, device=ELSEWHERE)
    assert await content(snapshot) == "9"
    await write(original, "1")
    die(original)
    again, _ = await opened(storage.bytes, tmp_path)
    assert await content(again) == "19"


async def test_a_snapshot_gets_nothing_that_was_written_later(tmp_path: Path) -> None:
    """Its file is long enough for the place: the original was writing to a higher one when it was taken."""
    original, storage = await opened(new(), tmp_path)
    snapshot = storage.bytes + bytes(3 * CLUSTER)
    await write(original, "1")
    copy, _ = await opened(snapshot, tmp_path, device=ELSEWHERE)
    assert await content(copy) == ""
    assert not copy.journal_remark


async def test_a_snapshot_of_what_a_kill_left_shares_the_journal_with_it(tmp_path: Path) -> None:
    original, storage = await opened(new(), tmp_path)
    await write(original, "12")
    die(original)
    snapshot, _ = await opened(storage.bytes, tmp_path, device=ELSEWHERE)
    assert await content(snapshot) == "12"
    again, _ = await opened(storage.bytes, tmp_path)
    assert await content(again) == "12"
    assert len(os.listdir(tmp_path)) == 2  # those of the two sessions that run


async def test_a_file_system_may_get_another_number_when_it_is_mounted_again(tmp_path: Path) -> None:
    original, storage = await opened(new(), tmp_path)
    await write(original, "12")
    die(original)
    again, _ = await opened(storage.bytes, tmp_path, device=ELSEWHERE)
    assert await content(again) == "12"


async def test_an_older_state_that_was_put_back_is_served_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.qed"
    create_overlay(str(path), image_size=16 * CLUSTER, backing=None, cluster_size=CLUSTER)
    overlay = await open_overlay(str(path), writable=True, journal_folder=tmp_path)
    await write(overlay, "1")
    await overlay.commit()
    older = path.read_bytes()
    await write(overlay, "23")
    die(overlay)
    overlay.storage.close()
    path.write_bytes(older)  # the inode stays
    for said in (1, 1):
        again = await open_overlay(str(path), writable=True, journal_folder=tmp_path)
        assert await content(again) == "1"
        await again.close()
        assert len(caplog.messages) == said
    assert "of another state of this overlay" in caplog.messages[0]


async def test_a_read_only_opening_shows_what_was_left(tmp_path: Path) -> None:
    """Also clusters of tables that the file does not have, and a last one that is short. Nothing is written."""
    overlay, storage = await opened(empty(image_size=16 << 20, backing=b"").data, tmp_path)
    tables = range(0, 16 << 20, 2 << 20)
    for pos in tables[1::2]:
        await overlay.write(pos, b"a" * CLUSTER, no_fill)
    await overlay.write(0, b"b" * 512, no_fill)
    die(overlay)
    before = bytes(storage.bytes)
    assert len(before) % CLUSTER
    for locked in (True, False):
        reader = MemoryStorage(before, name="disk", writable=False)
        reader.locked = locked
        shown = await open_storage(reader, journal_folder=tmp_path)
        image = await read_all(shown, bytes(shown.image_size))
        assert [pos for pos in tables if image[pos : pos + CLUSTER] == b"a" * CLUSTER] == list(tables[1::2])
        assert (bytes(image[:CLUSTER]), sum(map(bool, image))) == (b"b" * 512 + bytes(CLUSTER - 512), 4 * CLUSTER + 512)
        await shown.count_missing()
        assert shown.missing == shown.geometry.clusters - 5
        assert await shown.clusters.next_missing(0, 1) == (1, 1)
        await shown.close()
        assert reader.bytes == before
    again, _ = await opened(before, tmp_path)
    assert await read_all(again, bytes(again.image_size)) == image


async def test_a_read_only_opening_shows_a_last_cluster_that_is_short(tmp_path: Path) -> None:
    """Its table is in the file: nothing is allocated behind it."""
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    await overlay.commit()
    await overlay.write(0, b"b" * 512, no_fill)
    die(overlay)
    reader = MemoryStorage(storage.bytes, name="disk", writable=False)
    image = await read_all(await open_storage(reader, journal_folder=tmp_path), bytes(1 << 20))
    assert image[: 2 * CLUSTER] == b"b" * 512 + bytes(CLUSTER - 512) + b"1" * CLUSTER


@pytest.mark.parametrize("length", [512, 65536])
async def test_the_whole_map_has_what_was_left_behind_the_file_s_end(tmp_path: Path, length: int) -> None:
    """Its table, of four slices, is in memory only; its cluster may be short."""
    image = empty(cluster_size=65536, table_size=4, image_size=4 << 30, backing=b"").data
    overlay, storage = await opened(image, tmp_path)
    await overlay.write(0, b"b" * length, no_fill)
    die(overlay)
    reader = MemoryStorage(storage.bytes, name="disk", writable=False)
    runs = [run async for run in whole_map(await open_storage(reader, journal_folder=tmp_path))]
    assert runs == [Run(0x90000, 0, 65536), Run(MISSING, 65536, (4 << 30) - 65536)]


async def test_a_read_only_opening_without_locks_does_not_look_at_a_running_mount(tmp_path: Path) -> None:
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    reader = MemoryStorage(storage.bytes, name="disk", writable=False)
    reader.locked = False
    assert await content(await open_storage(reader, journal_folder=tmp_path)) == ""


@pytest.mark.parametrize("killed", [False, True])
async def test_a_failed_barrier_voids_the_journal(tmp_path: Path, killed: bool) -> None:
    """The disk may not have the data of any entry that is not committed, whatever the page cache shows."""
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    await overlay.commit()
    await write(overlay, "2")
    storage.fail("barrier", QedfsError("EIO"))
    with pytest.raises(QedfsError, match="EIO"):
        await overlay.flush()
    if killed:
        die(overlay)
    else:
        with pytest.raises(ReadOnlyOverlay, match=r"EIO.*may be lost"):
            await overlay.close()
    again, _ = await opened(storage.bytes, tmp_path)
    assert await content(again) == "1"


@pytest.mark.parametrize("device", [0, ELSEWHERE])
@pytest.mark.parametrize("nth", [1, 2])
async def test_a_failed_barrier_of_a_replay_voids_the_journal(tmp_path: Path, nth: int, device: int) -> None:
    """Linux tells of the failure once: the next opening would find nothing wrong."""
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "12")
    die(overlay)
    failing = MemoryStorage(storage.bytes, name="disk")
    failing.device_number = device
    failing.fail("barrier", QedfsError("EIO"), nth=nth)
    with pytest.raises(ReadOnlyOverlay, match="EIO"):
        await open_storage(failing, journal_folder=tmp_path)
    again, _ = await opened(failing.bytes, tmp_path, device=device)
    # The first barrier stands before the entries, the second behind them: then their data is durable.
    assert await content(again) == ("" if nth == 1 else "12")


async def test_a_failed_barrier_of_a_replay_needs_no_record_to_void_the_journal(tmp_path: Path) -> None:
    """The disk has lost what was written of the new session as well."""
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "12")
    die(overlay)
    failing = MemoryStorage(storage.bytes, name="disk")
    failing.fail("barrier", QedfsError("EIO"), forever=True)
    with pytest.raises(ReadOnlyOverlay, match="EIO"):
        await open_storage(failing, journal_folder=tmp_path)
    again, _ = await opened(storage.bytes, tmp_path)
    assert await content(again) == ""


@pytest.mark.parametrize("device", [0, ELSEWHERE])
async def test_an_older_state_is_told_by_what_was_committed_since(tmp_path: Path, device: int) -> None:
    """The file is long enough for all places: when it was copied, a write to a higher one was under way."""
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    await overlay.commit()
    older = storage.bytes + bytes(8 * CLUSTER)
    await write(overlay, "23")
    await overlay.commit()
    await write(overlay, "4")
    die(overlay)
    copy, _ = await opened(older, tmp_path, device=device)
    assert "of another state" in copy.journal_remark
    assert await content(copy) == "1"
    again, _ = await opened(storage.bytes, tmp_path)
    assert await content(again) == "1234"


@pytest.mark.parametrize("entry", [0, 1, 8192 + 512, 4096, 1 << 40])
async def test_a_journal_that_cannot_be_is_not_used(tmp_path: Path, entry: int) -> None:
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    assert overlay._journal.takes_entries
    overlay._journal.append([(2, entry)])
    die(overlay)
    again, _ = await opened(storage.bytes, tmp_path)
    assert "of another state" in again.journal_remark
    assert await content(again) == ""


async def test_a_full_disk_that_cut_off_a_place_loses_no_write_of_the_journal(tmp_path: Path) -> None:
    """The group has failed, but its discards are durable. The journal still has the discarded cluster's place."""
    overlay, storage = await opened(empty(backing=b"", image_size=1024 * CLUSTER).data, tmp_path)
    far = overlay.geometry.entries + 1  # in a table of its own, for which there will be no space
    await write(overlay, "0")
    await overlay.discard(1, 1)
    await overlay.flush()
    await overlay.give_space_back()
    await overlay.write(far * CLUSTER, b"f" * CLUSTER, no_fill)
    await write(overlay, "3")
    before = len(storage.bytes)
    await overlay.discard(3, 1)
    storage.fail("write", NoSpace("full"), nth=2, wrote=0)
    with pytest.raises(NoSpace):
        await overlay.committer.commit()
    await overlay.give_space_back()
    assert len(storage.bytes) == before - CLUSTER
    die(overlay)
    again, _ = await opened(storage.bytes, tmp_path)
    assert not again.journal_remark
    assert await content(again) == "0f"


async def test_a_cluster_that_has_another_place_shows_that_the_journal_is_of_another_state(tmp_path: Path) -> None:
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    await overlay.commit()
    place = overlay.clusters.entry(1)
    await write(overlay, "23")
    assert overlay._journal.takes_entries
    overlay._journal.append([(1, place + CLUSTER)])
    die(overlay)
    again, _ = await opened(storage.bytes, tmp_path)
    assert "of another state" in again.journal_remark
    assert await content(again) == "1"


@pytest.mark.expect_log("is of another state of this overlay, and is not used")
@pytest.mark.parametrize("entry", [1 << 63, (1 << 64) - CLUSTER])
async def test_no_place_that_a_journal_invents_ends_the_server(tmp_path: Path, entry: int) -> None:
    """The owner of an overlay can write both: offsets that no system call takes are read from a real file here."""
    path = str(tmp_path / "disk.qed")
    create_overlay(path, image_size=1 << 20, backing=None, cluster_size=CLUSTER)
    overlay = await open_overlay(path, writable=True, journal_folder=tmp_path)
    assert overlay._journal.takes_entries
    overlay._journal.append([(2, entry)])
    die(overlay)
    overlay.storage.close()
    again = await open_overlay(path, writable=True, journal_folder=tmp_path)
    assert "of another state" in again.journal_remark
    await again.close()


async def test_a_journal_is_read_no_more_often_than_the_file_has_clusters(tmp_path: Path) -> None:
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    assert overlay._journal.takes_entries
    overlay._journal.append([(1, overlay.clusters.entry(1))] * 10_000)
    die(overlay)
    again, left = await opened(storage.bytes, tmp_path)
    assert await content(again) == "1"
    assert left.operations["read"] < 4 * len(left.bytes) // CLUSTER


async def test_a_journal_that_was_brought_in_takes_no_memory(tmp_path: Path) -> None:
    """One may be 64 MiB, and there is one for each overlay of a folder."""
    overlay, storage = await opened(new(), tmp_path)
    await write(overlay, "1")
    assert overlay._journal.takes_entries
    overlay._journal.append([(1, overlay.clusters.entry(1))] * 60_000)
    left_bytes = overlay._journal.end
    die(overlay)
    tracemalloc.start()
    try:
        again, _ = await opened(storage.bytes, tmp_path)
        assert await content(again) == "1"
        assert tracemalloc.get_traced_memory()[0] < left_bytes // 2 + len(storage.bytes) + again.image_size
    finally:
        tracemalloc.stop()


@pytest.mark.expect_log("the space of discarded clusters is not given back: two entries point to the cluster")
async def test_no_journal_takes_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen invented bytes take a table in memory each; a true journal waits until there is room."""
    overlay, storage = await opened(empty(backing=b"", image_size=1 << 29).data, tmp_path)
    await write(overlay, "1")
    assert overlay._journal.takes_entries
    slices = [cluster for cluster in range(0, overlay.geometry.clusters, overlay.clusters.slice_entries) if cluster]
    overlay._journal.append([(cluster, overlay.clusters.entry(1)) for cluster in slices])
    die(overlay)
    small = memory_pool.Pool(len(slices) * CLUSTER // 4)
    with monkeypatch.context() as patch:
        patch.setattr(memory_pool, "TABLES", small)
        with pytest.raises(NoMemory, match="the journal of a killed mount needs"):
            await opened(storage.bytes, tmp_path)
        assert small.used_bytes == 0
    again, _ = await opened(storage.bytes, tmp_path)
    assert (await again.map(CLUSTER, 1))[0].offset > 1
    await again.close()
