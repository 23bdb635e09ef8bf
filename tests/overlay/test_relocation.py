"""Moves of data inside the file: whose bytes win, what is given back, and what a killed session finds."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import NoSpace
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay import loop_writes
from qedfs.overlay.journal import Journal, is_move, moved_to, place_of, run_count
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.relocation import PIECE_BYTES, Layout
from qedfs.overlay.sectors import SECTOR_ENTRIES
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty
from tests.overlay.scenario import read_all

CLUSTER = 4096


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def scattered(folder: Path | None = None, *, count: int = 8) -> tuple[Overlay, MemoryStorage]:
    """An overlay whose clusters were written backwards, each full of its own digit; all of it is durable."""
    storage = MemoryStorage(empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=folder)
    for cluster in reversed(range(count)):
        await overlay.write(cluster * CLUSTER, b"%d" % cluster * CLUSTER, no_fill)
    await overlay.flush()
    return overlay, storage


async def content(overlay: Overlay, count: int = 8) -> str:
    """The first byte of each cluster; each is full of one."""
    image = await read_all(overlay, bytes(overlay.image_size))
    clusters = [image[pos : pos + CLUSTER] for pos in range(0, count * CLUSTER, CLUSTER)]
    assert all(cluster.count(cluster[:1]) == CLUSTER for cluster in clusters)
    return "".join(chr(cluster[0] or ord(".")) for cluster in clusters)


async def gather(overlay: Overlay, first: int = 0, count: int = 8) -> int:
    gathering = await overlay.relocation.gather(first, count)
    assert gathering is not None
    moved = 0
    with gathering:
        while not gathering.ended:
            moved += await gathering.step()
    return moved


def test_a_move_in_the_journal_is_neither_a_place_nor_a_run_of_zeros() -> None:
    entry = moved_to(7 * CLUSTER)
    assert (is_move(entry), place_of(entry), run_count(entry)) == (True, 7 * CLUSTER, 0)
    assert (is_move(7 * CLUSTER), place_of(7 * CLUSTER)) == (False, 7 * CLUSTER)


async def test_what_was_written_backwards_is_in_one_piece_then() -> None:
    overlay, storage = await scattered()
    assert (await overlay.relocation.layout(0, 8)).pieces == 8
    end = len(storage.bytes)
    assert await gather(overlay) == 8 * CLUSTER
    assert await overlay.relocation.layout(0, 8) == Layout(8, 1, end)
    assert await content(overlay) == "01234567"
    await overlay.close()
    assert await content(await open_storage(MemoryStorage(storage.bytes))) == "01234567"


async def test_what_is_left_free_at_the_end_is_cut_off_when_all_is_moved_back() -> None:
    overlay, storage = await scattered()
    before = len(storage.bytes)
    first = before - 8 * CLUSTER
    await gather(overlay)
    await overlay.commit()
    await overlay.give_space_back()
    assert len(storage.bytes) == before + 8 * CLUSTER
    assert not any(storage.bytes[first:before])
    lowering = await overlay.relocation.lower(0, 8, before)
    assert lowering is not None
    with lowering:
        assert await lowering.step() == 8 * CLUSTER
    await overlay.commit()
    await overlay.give_space_back()
    assert (len(storage.bytes), await overlay.relocation.layout(0, 8)) == (before, Layout(8, 1, first))
    assert await overlay.relocation.lower(0, 8, first) is None
    assert await content(overlay) == "01234567"


async def test_only_data_is_moved_and_what_is_no_data_any_more_is_left_out() -> None:
    overlay, _ = await scattered()
    await overlay.discard(3, 1)
    gathering = await overlay.relocation.gather(0, 16)
    assert gathering is not None
    with gathering:
        await gathering.step(CLUSTER)
        await overlay.discard(1, 2)  # they were to be moved next
        while not gathering.ended:
            await gathering.step(CLUSTER)
    entries = [overlay.clusters.entry(cluster) for cluster in (1, 2, 3, 8)]
    assert entries == [ZERO, ZERO, ZERO, MISSING]
    assert (await overlay.relocation.layout(0, 16))[:2] == (5, 1)
    assert await content(overlay) == "0...4567"
    assert await overlay.relocation.gather(8, 8) is None


async def test_a_write_in_place_that_is_under_way_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, storage = await scattered()
    monkeypatch.setattr(loop_writes, "MOST_BYTES", 0)  # so that writes go to a thread
    go_on = trio.Event()
    in_thread = storage.in_thread

    async def held(function: object) -> object:
        await go_on.wait()
        return await in_thread(function)  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(storage, "in_thread", held)
        nursery.start_soon(overlay.write, 2 * CLUSTER, b"n" * CLUSTER, no_fill)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(gather, overlay)
        await trio.testing.wait_all_tasks_blocked()
        assert (await overlay.relocation.layout(0, 8)).pieces == 8
        go_on.set()
    assert (await overlay.relocation.layout(0, 8)).pieces == 1
    assert await content(overlay) == "01n34567"


async def test_a_read_under_way_keeps_the_old_place_as_it_is() -> None:
    overlay, _ = await scattered()
    (run,) = await overlay.map(5 * CLUSTER, CLUSTER)
    view = memoryview(bytearray(CLUSTER))
    with overlay.reading():
        await gather(overlay)
        await overlay.commit()
        assert not await overlay.give_space_back()
        await overlay.read_data(run.offset, view)
    assert bytes(view) == b"5" * CLUSTER
    assert await overlay.give_space_back()


async def test_what_a_killed_session_has_moved_is_found_with_the_writes_that_followed(tmp_path: Path) -> None:
    overlay, storage = await scattered(tmp_path)
    await gather(overlay)
    assert overlay.write_now(6 * CLUSTER, b"n" * CLUSTER)  # into the new place, of which only the journal knows
    left = MemoryStorage(storage.bytes, name="disk")
    again = await open_storage(left, journal_folder=tmp_path)
    assert not again.journal_remark
    assert await content(again) == "012345n7"
    await again.close()
    assert await content(await open_storage(MemoryStorage(left.bytes))) == "012345n7"


@pytest.mark.expect_log("writes to new clusters wait for a commit")
async def test_a_journal_that_takes_nothing_more_does_not_outlive_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay, storage = await scattered(tmp_path)
    monkeypatch.setattr(Journal, "append", no_room)
    await gather(overlay)
    assert os.listdir(tmp_path) == []
    assert await content(await open_storage(MemoryStorage(storage.bytes))) == "01234567"
    assert not overlay.write_now(6 * CLUSTER, b"n" * CLUSTER)  # the new place is not in the file yet
    await overlay.write(6 * CLUSTER, b"n" * CLUSTER, no_fill)
    assert await content(await open_storage(MemoryStorage(storage.bytes))) == "012345n7"


@pytest.mark.expect_log("writes to new clusters wait for a commit")
@pytest.mark.parametrize("trouble", ["full disk", "cancelled"])
async def test_what_was_moved_is_never_taken_for_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """The journal takes nothing more, and the commit that makes it void does not come to its end."""
    overlay, storage = await scattered(tmp_path)
    await overlay.write(9 * CLUSTER, b"9" * CLUSTER, no_fill)  # so that there is something to commit
    monkeypatch.setattr(Journal, "append", no_room)
    with trio.CancelScope() as scope:
        if trouble == "cancelled":
            scope.cancel()
            await gather(overlay)
        else:
            storage.fail("write", NoSpace("full"), nth=2, wrote=0)
            with pytest.raises(NoSpace):
                await gather(overlay)
    storage.mend()
    await overlay.write(10 * CLUSTER, b"n" * 8 * CLUSTER, no_fill)  # into whatever is free
    assert await content(overlay, 18) == "01234567.9nnnnnnnn"


@pytest.mark.expect_log("writes to new clusters wait for a commit")
async def test_a_kill_after_the_journal_was_full_loses_no_write_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "journal").mkdir()
    overlay, storage = await scattered(folder)
    far = 3 * SECTOR_ENTRIES  # its entry is in another sector, which a group may have written or not
    await overlay.discard(0, 8)
    await overlay.flush()
    for cluster in (*reversed(range(8)), far):
        await overlay.write(cluster * CLUSTER, b"%d" % (cluster % 10) * CLUSTER, no_fill)  # in the journal only
    left: list[tuple[bytes, dict[str, bytes]]] = []
    storage.before_step = lambda: left.append(
        (bytes(storage.bytes), {p.name: p.read_bytes() for p in folder.iterdir()})
    )
    monkeypatch.setattr(Journal, "append", no_room)
    await gather(overlay)
    assert len(left) > 4
    for number, (image, journals) in enumerate(left):
        (found := tmp_path / f"{number}").mkdir()
        for name, entries in journals.items():
            (found / name).write_bytes(entries)
        again = await open_storage(MemoryStorage(image, name="disk"), journal_folder=found)
        assert "is not used" not in again.journal_remark
        assert (await content(again, far + 1)).replace(".", "") == f"01234567{far % 10}"


async def test_a_full_disk_changes_nothing_and_its_place_is_free_again() -> None:
    overlay, storage = await scattered()
    before = len(storage.bytes)
    storage.fail("write", NoSpace("full"), nth=1, wrote=0.5)
    with pytest.raises(NoSpace):
        await gather(overlay)
    assert (await overlay.relocation.layout(0, 8)).pieces == 8
    assert (len(storage.bytes), await content(overlay)) == (before, "01234567")
    assert not overlay.commit_pending


async def test_a_piece_is_no_larger_than_what_the_event_loop_may_copy_at_once() -> None:
    clusters = PIECE_BYTES // CLUSTER + 3
    overlay, _ = await scattered(count=clusters)
    gathering = await overlay.relocation.gather(0, clusters)
    assert gathering is not None
    with gathering:
        assert [await gathering.step(), await gathering.step(), gathering.ended] == [PIECE_BYTES, 3 * CLUSTER, True]


async def test_what_is_not_in_the_page_cache_is_read_first_and_not_kept_there(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, storage = await scattered()
    monkeypatch.setattr(storage, "read_now", lambda *_: False)
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(storage, "drop_cache", lambda offset, size: dropped.append((offset, size)))
    await gather(overlay)
    await overlay.flush()
    assert dropped == [((await overlay.relocation.layout(0, 8)).first, 8 * CLUSTER)]
    assert await content(overlay) == "01234567"


async def test_nothing_is_moved_while_the_file_is_copied() -> None:
    overlay, _ = await scattered()
    async with trio.open_nursery() as nursery, overlay.still():
        nursery.start_soon(gather, overlay)
        await trio.testing.wait_all_tasks_blocked()
        assert (await overlay.relocation.layout(0, 8)).pieces == 8
    assert (await overlay.relocation.layout(0, 8)).pieces == 1
