"""Drops of what the backing has, too: which clusters stay, what is given back, and what a killed session finds.

Each rule is taken away once, to see that something breaks without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import BadOverlay, InUse, NoSpace, UsageError
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay import loop_writes
from qedfs.overlay.journal import dropped_run, is_drop, run_count, zero_run
from qedfs.overlay.loop_writes import LoopWrites
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.actors import StillBacking
from tests.overlay.images import empty
from tests.overlay.mutants import Mutant, mutated
from tests.overlay.scenario import read_all

CLUSTER = 4096
COUNT = 8
SIZE = 64 * CLUSTER
BASE = b"".join(b"%d" % (number % 10) * CLUSTER for number in range(60)).ljust(SIZE, b"\0")


async def base_fill(cluster: int) -> bytes:
    return BASE[cluster * CLUSTER : (cluster + 1) * CLUSTER]


async def adopted(folder: Path | None = None) -> tuple[Overlay, MemoryStorage]:
    """An overlay that has some clusters of its backing, durably."""
    storage = MemoryStorage(empty(image_size=SIZE, backing=b"base").data, name="disk")
    overlay = await open_storage(storage, journal_folder=folder)
    await overlay.adopt(0, bytearray(BASE[: COUNT * CLUSTER]), COUNT * CLUSTER)
    await overlay.adopt_zeros(60, 2)
    await overlay.flush()
    overlay.dropping.allow()
    return overlay, storage


def entries(overlay: Overlay, *clusters: int) -> list[int]:
    return [min(overlay.clusters.entry(cluster), ZERO + 1) for cluster in clusters]


async def drop(overlay: Overlay, base: bytes = BASE, count: int = 64) -> int:
    dropped = await overlay.dropping.drop(0, count, StillBacking(base))
    assert dropped is not None
    return dropped


async def content(overlay: Overlay, base: bytes = BASE) -> bytes:
    return bytes(await read_all(overlay, base))


def test_a_drop_in_the_journal_is_a_run_but_not_one_of_zeros() -> None:
    entry = dropped_run(7)
    assert (run_count(entry), is_drop(entry), is_drop(zero_run(7)), is_drop(CLUSTER)) == (7, True, False, False)


async def test_what_is_the_same_is_missing_then_and_what_differs_stays() -> None:
    overlay, storage = await adopted()
    await overlay.count_missing()
    before = overlay.missing
    await overlay.write(2 * CLUSTER + 5, b"guest", base_fill)
    await overlay.discard(4, 1)
    expected = await content(overlay)
    assert await drop(overlay) == COUNT - 2 + 2
    assert entries(overlay, 1, 2, 3, 4, 60) == [MISSING, ZERO + 1, MISSING, ZERO, MISSING]
    assert overlay.missing == (before or 0) + COUNT
    assert await content(overlay) == expected
    assert await drop(overlay) == 0
    await overlay.close()
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"))
    assert await content(again) == expected
    assert entries(again, 1, 2, 60) == [MISSING, ZERO + 1, MISSING]
    await again.count_missing()
    assert again.missing == (before or 0) + COUNT


async def test_the_last_cluster_may_end_with_the_image() -> None:
    size = 5 * CLUSTER + 512
    storage = MemoryStorage(empty(image_size=size, backing=b"base").data, name="disk")
    overlay = await open_storage(storage)
    overlay.dropping.allow()
    await overlay.adopt(5 * CLUSTER, bytearray(BASE[5 * CLUSTER : size]), 512)
    assert await overlay.dropping.drop(0, 6, StillBacking(BASE[:size])) == 1


@pytest.mark.parametrize("cached", [True, False])
async def test_the_event_loop_never_waits_for_the_backing(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if its file system never says what is in memory, as FUSE and NFS do."""
    overlay, storage = await adopted()
    in_thread, threads = storage.in_thread, list[bool]()

    async def noted(function: Callable[[], object]) -> object:
        threads.append(True)
        try:
            return await in_thread(function)
        finally:
            threads.clear()

    class Slow(StillBacking):
        def read_now(self, pos: int, view: memoryview) -> bool:
            return cached and super().read_now(pos, view)

        def read_waiting(self, pos: int, view: memoryview) -> None:
            assert threads or cached
            StillBacking.read_waiting(self, pos, view)

        def hole_end(self, pos: int) -> int:
            assert threads
            return super().hole_end(pos)

    monkeypatch.setattr(storage, "in_thread", noted)
    assert await overlay.dropping.drop(0, 64, Slow(BASE)) == COUNT + 2


async def test_the_place_is_given_back_after_a_barrier_for_the_entry() -> None:
    overlay, storage = await adopted()
    (run,) = await overlay.map(0, CLUSTER)
    await drop(overlay)
    await overlay.give_space_back()
    assert storage.bytes[run.offset : run.offset + CLUSTER] == BASE[:CLUSTER]
    await overlay.commit()
    assert await overlay.give_space_back()
    assert not any(storage.bytes[run.offset : run.offset + CLUSTER])


async def test_a_read_under_way_keeps_the_old_place_as_it_is() -> None:
    overlay, _ = await adopted()
    (run,) = await overlay.map(5 * CLUSTER, CLUSTER)
    view = memoryview(bytearray(CLUSTER))
    with overlay.reading():
        await drop(overlay)
        await overlay.commit()
        assert not await overlay.give_space_back()
        await overlay.read_data(run.offset, view)
    assert bytes(view) == BASE[5 * CLUSTER : 6 * CLUSTER]
    assert await overlay.give_space_back()


async def write_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Drop while a thread writes in place. Returns whether the write is there afterwards."""
    overlay, storage = await adopted()
    monkeypatch.setattr(loop_writes, "MOST_BYTES", 0)  # so that writes go to a thread
    go_on, in_thread = trio.Event(), storage.in_thread

    async def held(function: object) -> object:
        await go_on.wait()
        return await in_thread(function)  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(storage, "in_thread", held)
        nursery.start_soon(overlay.write, 2 * CLUSTER, b"n" * CLUSTER, base_fill)
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(loop_writes, "MOST_BYTES", 1 << 20)
        await drop(overlay, count=COUNT)  # without zero clusters, for which it needs a thread itself
        go_on.set()
    return (await content(overlay))[2 * CLUSTER : 3 * CLUSTER] == b"n" * CLUSTER


async def partial_write(_: pytest.MonkeyPatch) -> bool:
    """Drop a cluster while a write waits for the rest of it, from before the backing got what is there now."""
    overlay, _storage = await adopted()
    new = bytearray(BASE)
    new[20 * CLUSTER : 21 * CLUSTER] = b"n" * CLUSTER
    go_on = trio.Event()

    async def slow_fill(cluster: int) -> bytes:
        rest = await base_fill(cluster)
        await go_on.wait()
        return rest

    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.write, 20 * CLUSTER, b"part", slow_fill)
        await trio.testing.wait_all_tasks_blocked()
        await overlay.write(20 * CLUSTER, b"n" * CLUSTER, base_fill)
        await drop(overlay, bytes(new))  # the commit has written it to the backing
        go_on.set()
    return (await content(overlay, bytes(new)))[20 * CLUSTER :][:CLUSTER] == b"part" + b"n" * (CLUSTER - 4)


async def write_beside(_: pytest.MonkeyPatch) -> bool:
    """Drop and write at once."""
    for _number in range(30):
        overlay, _storage = await adopted()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drop, overlay)
            nursery.start_soon(overlay.write, 2 * CLUSTER, b"n" * CLUSTER, base_fill)
        if (await content(overlay))[2 * CLUSTER : 3 * CLUSTER] != b"n" * CLUSTER:
            return False
    return True


MEANWHILE = {
    "write_into(place, size) is not None": (write_in_a_thread, "False"),
    " or self._pending.is_pending(cluster)": (partial_write, ""),
    "elif self._publish(same):": (write_beside, "elif await trio.lowlevel.checkpoint() or self._publish(same):"),
}


@pytest.mark.parametrize("rule", MEANWHILE)
async def test_what_is_written_meanwhile_stays(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    story, without = MEANWHILE[rule]
    assert await story(monkeypatch)
    old = f"self._pending.{rule}" if rule.startswith("write_into") else rule
    function = "dropping:Dropping.drop" if "publish" in rule else "dropping:Dropping._same"
    with mutated(Mutant(rule, function, old, without)):
        assert not await story(monkeypatch)


async def killed_after(folder: Path, *, commit: bool) -> bool:
    """Drop, write, and be killed. Returns whether the next session has all that was written."""
    overlay, storage = await adopted(folder)
    await overlay.write(7 * CLUSTER, b"w" * CLUSTER, base_fill)
    await overlay.write(7 * CLUSTER, BASE[7 * CLUSTER : 8 * CLUSTER], base_fill)
    await drop(overlay)
    if commit:
        await overlay.commit()
    await overlay.write(3 * CLUSTER, b"n" * CLUSTER, base_fill)
    expected = await content(overlay)
    try:
        again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=folder)
        return await content(again) == expected
    except BadOverlay:
        return False


@pytest.mark.parametrize("commit", [False, True])
async def test_a_killed_session_leaves_the_drop_and_the_write_after_it(tmp_path: Path, commit: bool) -> None:
    assert await killed_after(tmp_path, commit=commit)


RULES = (
    Mutant(
        "a drop is in the journal",
        "dropping:Dropping._publish",
        "self._journal.append([(cluster, dropped_run(count)) for cluster, count in _runs(same)])",
        "pass",
    ),
    Mutant(
        "a drop in the journal takes effect again, in its order among writes",
        "recovery:_apply_drop",
        "clusters.drop(range(cluster, end), {})",
        "pass",
    ),
)


@pytest.mark.parametrize("mutant", RULES, ids=lambda mutant: mutant.rule)
async def test_each_rule_is_necessary(mutant: Mutant, tmp_path: Path) -> None:
    with mutated(mutant):
        assert not await killed_after(tmp_path, commit=False)


async def zeros_fetched_after(folder: Path) -> bool:
    """Drop zeros, commit that, fetch them again, commit that, write, and be killed."""
    overlay, storage = await adopted(folder)
    await overlay.dropping.drop(60, 2, StillBacking(BASE))
    await overlay.commit()
    await overlay.adopt_zeros(60, 2)
    await overlay.commit()
    await overlay.write(3 * CLUSTER, b"n" * CLUSTER, base_fill)
    await overlay.write(30 * CLUSTER, b"n" * CLUSTER, base_fill)
    expected = await content(overlay)
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=folder)
    return await content(again) == expected


async def test_a_journal_fits_whose_last_drop_was_followed_by_fetched_zeros(tmp_path: Path) -> None:
    assert await zeros_fetched_after(tmp_path)
    without = Mutant("the witness", "recovery:_left_by", "return MISSING, ZERO", "return (MISSING,)")
    with mutated(without):
        assert not await zeros_fetched_after(tmp_path)


@pytest.mark.expect_log("No space left on device; writes to new clusters wait for a commit")
async def test_a_journal_that_takes_no_more_is_void_before_anything_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay, storage = await adopted(tmp_path)
    await overlay.write(30 * CLUSTER, b"w" * CLUSTER, base_fill)
    monkeypatch.setattr("qedfs.overlay.journal.Journal.append", no_room)
    assert await drop(overlay) == COUNT + 2
    expected = await content(overlay)
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    assert await content(again) == expected


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


async def test_what_is_not_in_the_page_cache_is_read_in_a_thread_first(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, storage = await adopted()
    monkeypatch.setattr(storage, "read_now", lambda *_: False)
    monkeypatch.setattr(StillBacking, "read_now", lambda *_: False)
    assert await drop(overlay) == COUNT + 2


async def test_nothing_is_compared_where_the_event_loop_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, _ = await adopted()
    monkeypatch.setattr("qedfs.overlay.dropping.CROWDED_SECONDS", 0)
    monkeypatch.setattr(LoopWrites, "may_begin", lambda *_: False)
    assert await overlay.dropping.drop(0, COUNT, StillBacking(BASE)) is None
    assert entries(overlay, 0, 1) == [ZERO + 1, ZERO + 1]


async def test_an_overlay_that_may_drop_clusters_keeps_its_backing() -> None:
    overlay, _ = await adopted()
    with pytest.raises(InUse, match="committed into its backing"):
        await overlay.detach()
    assert overlay.backing == "base"
    assert await drop(overlay) == overlay.dropping.count == COUNT + 2
    overlay.dropping.forbid()
    await overlay.detach()
    with pytest.raises(UsageError, match="needs no backing"):
        overlay.dropping.allow()


async def test_after_a_detach_that_has_failed_clusters_may_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, storage = await adopted()
    overlay.dropping.forbid()
    storage.fail("write", NoSpace("full"), nth=1)
    with pytest.raises(NoSpace):
        await overlay.detach()
    overlay.dropping.allow()
    assert await drop(overlay) == COUNT + 2
