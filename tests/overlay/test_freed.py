"""The space of discarded clusters: when it is given back, and when it is used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from qedfs.errors import NoSpace, QedfsError
from qedfs.format.tables import ZERO
from qedfs.overlay import free_places, loop_writes
from qedfs.overlay import freed as freed_module
from qedfs.overlay.journal import Journal
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import PUNCH_SECONDS, Overlay
from qedfs.overlay.relocation import ROOM_BYTES
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty, filled

T = TypeVar("T")
CLUSTER = 4096
DATA = {cluster: bytes([65 + cluster]) * CLUSTER for cluster in range(6)}


def offsets(storage: MemoryStorage) -> dict[int, int]:
    """Where in the file the clusters of DATA are that it still has."""
    found = {cluster: storage.bytes.find(data) for cluster, data in DATA.items()}
    return {cluster: offset for cluster, offset in found.items() if offset >= 0}


async def opened(journals: Path | None = None) -> tuple[MemoryStorage, Overlay]:
    """An overlay with DATA. Without a journal, a discard commits at once."""
    storage = MemoryStorage(filled(DATA).data, name="disk")
    return storage, await open_storage(storage, journal_folder=journals)


async def place_of(overlay: Overlay, cluster: int) -> int:
    (run,) = await overlay.map(cluster * CLUSTER, CLUSTER)
    return run.offset


async def test_space_is_punched_after_the_barrier_and_used_again(tmp_path: Path) -> None:
    storage, overlay = await opened(tmp_path)
    freed = offsets(storage)[2]
    await overlay.discard(2, 1)
    await overlay.give_space_back()
    assert 2 in offsets(storage)  # the disk may still have the old entry
    await overlay.commit()
    await overlay.give_space_back()
    assert not any(storage.bytes[freed : freed + CLUSTER])
    size = storage.size()
    await overlay.write(9 * CLUSTER + 5, b"part", lambda _: _filled())
    assert await place_of(overlay, 9) == freed
    await overlay.flush()
    assert storage.size() == size


async def _filled() -> bytes:
    return b"r" * CLUSTER


async def test_a_part_of_a_cluster_is_written_to_a_blank_one() -> None:
    storage, overlay = await opened()
    freed = offsets(storage)[2]
    await overlay.discard(2, 2)
    await overlay.flush()
    await overlay.give_space_back()
    await overlay.write(3 * CLUSTER + 5, b"part", no_fill)
    assert await place_of(overlay, 3) == freed
    view = memoryview(bytearray(CLUSTER))
    await overlay.read_data(freed, view)
    assert bytes(view) == b"part".rjust(9, b"\0").ljust(CLUSTER, b"\0")


async def test_space_at_the_end_of_the_file_is_cut_off() -> None:
    storage, overlay = await opened()
    size = storage.size()
    await overlay.discard(3, 3)
    await overlay.flush()
    await overlay.give_space_back()
    assert storage.size() == size - 3 * CLUSTER
    await overlay.close()
    again = await open_storage(MemoryStorage(storage.bytes))
    assert await place_of(again, 0) > ZERO


async def test_closing_gives_space_back() -> None:
    storage, overlay = await opened()
    await overlay.discard(2, 1)
    await overlay.close()
    assert set(offsets(storage)) == {0, 1, 3, 4, 5}


async def test_a_read_under_way_keeps_its_bytes() -> None:
    storage, overlay = await opened()
    freed = offsets(storage)[2]
    with overlay.reading():
        await overlay.discard(2, 1)
        await overlay.flush()
        await overlay.give_space_back()
        await overlay.write(9 * CLUSTER, b"other" * 800 + b"x" * 96, no_fill)
        assert storage.bytes[freed : freed + CLUSTER] == DATA[2]
    await overlay.give_space_back()
    assert not any(storage.bytes[freed : freed + CLUSTER])


async def test_a_write_in_place_under_way_overwrites_no_other_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has looked up the place before the discard, and reaches it when another cluster would be there."""
    storage, overlay = await opened()
    freed = offsets(storage)[2]
    real = storage.in_thread
    begun, go_on = trio.Event(), trio.Event()

    async def slowly(function: Callable[[], T]) -> T:
        begun.set()
        await go_on.wait()
        return await real(function)

    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as slow:
            slow.setattr(storage, "in_thread", slowly)
            slow.setattr(loop_writes, "MOST_BYTES", 0)
            nursery.start_soon(overlay.write, 2 * CLUSTER, b"late" * 1024, no_fill)
            await begun.wait()
        await overlay.discard(2, 1)
        await overlay.flush()
        await overlay.give_space_back()
        await overlay.write(9 * CLUSTER, b"o" * CLUSTER, no_fill)
        assert await place_of(overlay, 9) != freed
        go_on.set()
    assert storage.bytes[freed : freed + CLUSTER] == b"late" * 1024
    await overlay.give_space_back()
    assert not any(storage.bytes[freed : freed + CLUSTER])


async def test_a_file_system_that_cannot_punch_has_old_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, overlay = await opened()
    freed = offsets(storage)[2]
    monkeypatch.setattr(storage, "punch", lambda *_: False)
    await overlay.discard(2, 2)
    await overlay.flush()
    await overlay.give_space_back()
    await overlay.write(3 * CLUSTER + 5, b"part", no_fill)
    assert await place_of(overlay, 3) != freed  # the rest of it would not be zeros
    await overlay.write(9 * CLUSTER, b"w" * CLUSTER, no_fill)
    assert await place_of(overlay, 9) == freed


async def test_nothing_is_given_back_while_the_journal_has_older_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage(empty().data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.write(CLUSTER, DATA[1], no_fill)
    await overlay.discard(1, 1)
    monkeypatch.setattr(Journal, "landed", lambda *_: False)
    await overlay.flush()
    await overlay.give_space_back()
    assert 1 in offsets(storage)


async def test_nothing_is_given_back_after_a_failed_barrier_or_of_a_truncated_file() -> None:
    storage, overlay = await opened()
    await overlay.discard(1, 1)
    await overlay.flush()
    await overlay.discard(2, 1)
    await overlay.write(5 * CLUSTER, DATA[5], no_fill)
    storage.fail("barrier", QedfsError("cannot sync"))
    with pytest.raises(QedfsError):
        await overlay.flush()
    await overlay.give_space_back()
    assert set(offsets(storage)) == set(DATA)
    storage, overlay = await opened()
    await overlay.discard(1, 1)
    await overlay.flush()
    del storage.bytes[-CLUSTER:]
    await overlay.give_space_back()
    assert 1 in offsets(storage)


async def test_the_list_of_free_clusters_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond it is punched and forgotten."""
    monkeypatch.setattr(free_places, "BLOCK", 1)
    monkeypatch.setattr(free_places, "MOST_BLOCKS", 2)
    storage, overlay = await opened()
    for cluster in (0, 2, 4):
        await overlay.discard(cluster, 1)
    await overlay.flush()
    await overlay.give_space_back()
    assert set(offsets(storage)) == {1, 3, 5}
    size = storage.size()
    for cluster in range(20, 24):
        await overlay.write(cluster * CLUSTER, b"w" * CLUSTER, no_fill)
    await overlay.flush()
    assert storage.size() == size + 2 * CLUSTER


async def test_the_end_of_the_file_is_cut_off_before_places_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_places, "BLOCK", 1)
    monkeypatch.setattr(free_places, "MOST_BLOCKS", 2)
    storage, overlay = await opened()
    end = offsets(storage)[4]
    for cluster, count in ((0, 1), (2, 1), (4, 2)):
        await overlay.discard(cluster, count)
    await overlay.flush()
    await overlay.give_space_back()
    assert storage.size() == end


async def test_two_at_once_give_it_back_once() -> None:
    storage, overlay = await opened()
    await overlay.discard(0, 3)
    await overlay.flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.give_space_back)
        nursery.start_soon(overlay.give_space_back)
    assert storage.operations["punch"] == 1


@pytest.mark.parametrize("seed", range(8))
async def test_closing_waits_for_a_punch_and_gives_the_rest_back(seed: int) -> None:
    """The image's task that gives space back was cancelled a moment ago, and its thread may still be punching."""
    storage = MemoryStorage(filled(DATA).data, name="disk", seed=seed)
    overlay = await open_storage(storage)
    with overlay.reading():
        for cluster in (1, 3):
            await overlay.discard(cluster, 1)
            await overlay.flush()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.give_space_back)
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await overlay.close()  # the fake accepts nothing after it
    await overlay.give_space_back()
    assert set(offsets(storage)) == {0, 2, 4, 5}


async def test_a_file_whose_length_is_unknown_costs_space_only(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, overlay = await opened()
    await overlay.discard(3, 3)
    await overlay.flush()

    def size() -> int:
        raise QedfsError("stale file handle")

    monkeypatch.setattr(storage, "size", size)
    await overlay.give_space_back()
    monkeypatch.undo()
    await overlay.write(9 * CLUSTER, b"w" * CLUSTER, no_fill)
    await overlay.close()
    again = await open_storage(MemoryStorage(storage.bytes))
    assert await place_of(again, 9) > ZERO


async def test_a_thread_punches_only_so_much_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Periodic commits wait for it. What is left when the time is up stays for the next turn."""
    monkeypatch.setattr(freed_module, "RUNS_AT_ONCE", 3)
    monkeypatch.setattr(freed_module, "CLUSTERS_AT_ONCE", 4)
    storage = MemoryStorage(filled(dict.fromkeys(range(40), b"d" * CLUSTER)).data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    for cluster in (*range(10), *range(11, 39, 2)):  # ten neighbours, and fourteen apart
        await overlay.discard(cluster, 1)
    await overlay.flush()
    punched: list[int] = []
    real = storage.in_thread

    async def counting(function: Callable[[], T]) -> T:
        before = storage.operations["punch"]
        result = await real(function)
        punched.append(storage.operations["punch"] - before)
        return result

    monkeypatch.setattr(storage, "in_thread", counting)
    with monkeypatch.context() as hurry:
        hurry.setattr(freed_module, "SECONDS_AT_ONCE", 0)
        await overlay.give_space_back()
    assert storage.bytes.count(b"d" * CLUSTER) == 40
    await overlay.give_space_back()
    assert max(punched) == 3
    assert storage.bytes.count(b"d" * CLUSTER) == 16


@pytest.mark.parametrize("blank", [True, False])
async def test_places_are_used_from_the_lowest_on(blank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, overlay = await opened()
    if not blank:
        monkeypatch.setattr(storage, "punch", lambda *_: False)
    places = sorted(offsets(storage)[cluster] for cluster in (0, 2, 3))
    for cluster in (3, 0, 2):
        await overlay.discard(cluster, 1)
    await overlay.flush()
    await overlay.give_space_back()
    for cluster in (20, 21, 22):
        await overlay.write(cluster * CLUSTER, b"w" * CLUSTER, no_fill)
    assert [await place_of(overlay, cluster) for cluster in (20, 21, 22)] == places


async def test_punches_that_are_put_off_wait_for_their_neighbours() -> None:
    storage, overlay = await opened()
    await overlay.relocation.put_off_punches()
    for cluster in (0, 2, 4):
        await overlay.discard(cluster, 1)
        await overlay.flush()
        assert not await overlay.give_space_back()
    assert (overlay.has_space_to_give_back, overlay.relocation.put_off_bytes) == (False, 3 * CLUSTER)
    assert set(offsets(storage)) == set(DATA)
    for cluster in (1, 3):
        await overlay.discard(cluster, 1)
    await overlay.flush()
    await overlay.give_space_back()
    overlay.relocation.punch_again()
    assert overlay.has_space_to_give_back
    await overlay.give_space_back()
    assert (set(offsets(storage)), storage.operations["punch"]) == ({5}, 1)
    assert not overlay.relocation.put_off_bytes
    size = storage.size()
    for cluster in range(5):
        await overlay.write((20 + cluster) * CLUSTER, b"w" * CLUSTER, no_fill)
    await overlay.flush()
    assert storage.size() == size


async def test_no_write_takes_a_place_before_its_punch_that_was_put_off() -> None:
    """The punch would make zeros of what was written there."""
    storage, overlay = await opened()
    await overlay.relocation.put_off_punches()
    place = await place_of(overlay, 2)
    await overlay.discard(2, 1)
    await overlay.flush()
    await overlay.give_space_back()
    await overlay.write(20 * CLUSTER, b"w" * CLUSTER, no_fill)
    assert await place_of(overlay, 20) != place
    overlay.relocation.punch_again()
    await overlay.give_space_back()
    assert storage.operations["punch"] == 1
    await overlay.write(21 * CLUSTER, b"v" * CLUSTER, no_fill)
    assert await place_of(overlay, 21) == place, "once"
    await overlay.write(22 * CLUSTER, b"u" * CLUSTER, no_fill)
    assert len({await place_of(overlay, cluster) for cluster in (20, 21, 22)}) == 3


async def test_as_much_is_put_off_as_an_end_of_the_mount_can_make_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_module, "MOST_PUT_OFF", 2)
    storage, overlay = await opened()
    await overlay.relocation.put_off_punches()
    for cluster in (0, 2, 4):
        await overlay.discard(cluster, 1)
        await overlay.flush()
        await overlay.give_space_back()
    assert set(offsets(storage)) == {0, 1, 2, 3, 5}
    await overlay.close()
    assert set(offsets(storage)) == {1, 3, 5}


async def test_a_close_does_not_wait_for_all_punches_of_a_slow_file_server(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freed_module, "RUNS_AT_ONCE", 1)
    storage = MemoryStorage(filled(dict.fromkeys(range(40), b"d" * CLUSTER)).data, name="disk")
    overlay = await open_storage(storage)
    await overlay.relocation.put_off_punches()
    for cluster in range(0, 40, 2):
        await overlay.discard(cluster, 1)
    await overlay.flush()
    await overlay.give_space_back()
    real = storage.in_thread

    async def slow(function: Callable[[], T]) -> T:
        before = storage.operations["punch"]
        result = await real(function)
        with trio.CancelScope(shield=True):  # a thread cannot be interrupted
            await trio.sleep(storage.operations["punch"] - before)
        return result

    monkeypatch.setattr(storage, "in_thread", slow)
    await overlay.close()
    assert 0 < storage.operations["punch"] <= PUNCH_SECONDS + 1
    again = await open_storage(MemoryStorage(storage.bytes))
    for cluster in range(40):
        assert bool(await place_of(again, cluster) > ZERO) == bool(cluster % 2)


async def test_a_disk_with_little_room_has_nothing_put_off() -> None:
    storage, overlay = await opened()
    storage.left_bytes = ROOM_BYTES + CLUSTER
    for cluster in (0, 2):
        await overlay.relocation.put_off_punches()
        await overlay.discard(cluster, 1)
        await overlay.flush()
        await overlay.give_space_back()
    await overlay.relocation.put_off_punches()
    assert set(offsets(storage)) == set(DATA)
    storage.left_bytes -= 2 * CLUSTER  # others have used it
    await overlay.relocation.put_off_punches()
    await overlay.give_space_back()
    assert set(offsets(storage)) == {1, 3, 4, 5}


async def test_a_write_that_finds_no_space_gets_what_was_put_off() -> None:
    storage, overlay = await opened()
    await overlay.relocation.put_off_punches()
    await overlay.discard(2, 1)
    await overlay.flush()
    await overlay.give_space_back()
    storage.fail("write", NoSpace("full"))
    await overlay.write(9 * CLUSTER, b"w" * CLUSTER, no_fill)
    assert set(offsets(storage)) == {0, 1, 3, 4, 5}


async def test_a_write_in_place_that_finds_no_space_gets_it_too() -> None:
    """Into a hole of a cluster, or where the file system never overwrites in place."""
    storage, overlay = await opened()
    await overlay.relocation.put_off_punches()
    await overlay.discard(2, 1)
    await overlay.flush()
    await overlay.give_space_back()
    await overlay.write(3 * CLUSTER, b"w" * 512, no_fill)
    for nth in (1, 2):
        storage.fail("write", NoSpace("full"), nth=nth)
    assert not overlay.write_now(3 * CLUSTER, b"x" * 512)
    await overlay.write(3 * CLUSTER, b"x" * 512, no_fill)
    assert 2 not in offsets(storage)
    assert overlay.write_now(3 * CLUSTER, b"y" * 512)
