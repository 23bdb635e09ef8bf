"""A commit of an overlay into its backing: what both files say after a power cut at any moment, or after an error.

The states of the two disks are combined, as each may have lost what the other has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from qedfs.errors import QedfsError
from qedfs.format.record import Standby, digest
from qedfs.format.tables import MISSING
from qedfs.image.commit_down import LOOKS, Committed, _looks, commit_down, copy
from qedfs.image.commit_target import RawTarget
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import Session
from qedfs.source.samples import BLOCK_BYTES
from tests.fakes.storage import MemoryStorage, RecordingStorage
from tests.image.commits import (
    BASE,
    CHANGED,
    DATA,
    SIZE,
    ZEROS,
    Two,
    differs,
    disk_of,
    qed_base,
    runs_of,
    started,
    wanted,
)
from tests.overlay.examine import Broken
from tests.overlay.images import BACKING, empty
from tests.overlay.scenario import read_all


async def judge(overlay: bytes, backing: bytes) -> Overlay:
    """Raise Broken unless the image reads as ever, and a mount takes the backing for the version that it is."""
    opened = await open_storage(MemoryStorage(overlay))
    if await read_all(opened, backing.ljust(SIZE, b"\0")) != wanted():
        raise Broken("the image reads differently")
    pin = opened.record.pin
    if pin is None or pin.backing != digest(BACKING.decode()):
        raise Broken("the pin was lost")
    longer = opened.record.committing and pin.size < len(backing) <= SIZE  # as in image/pin.py
    if len(backing) != pin.size and not longer:
        raise Broken("the backing is of another size than its pin")
    if pin.last_modified is not None and backing != {"old": BASE, "new": wanted()}[pin.last_modified]:
        raise Broken(f"the backing is not what the pin says, {pin.last_modified}")
    if pin.last_modified is None and await differs(pin, backing):
        raise Broken("the samples differ")
    return opened


async def test_the_backing_gets_what_the_overlay_has_and_the_overlay_is_empty() -> None:
    two = Two(await started())
    assert await two.commit() == Committed(DATA, ZEROS, CHANGED, SIZE - len(BASE))
    assert bytes(two.backing.bytes) == wanted()
    opened = await judge(bytes(two.overlay.bytes), bytes(two.backing.bytes))
    assert [run.offset for run in await runs_of(opened)] == [MISSING]
    assert len(two.overlay.bytes) == len(empty(image_size=SIZE).data)
    assert not opened.record.committing
    # Nothing is left to do, so that nothing is written to the backing.
    again = Two(bytes(two.overlay.bytes), wanted())
    assert await again.commit() == Committed()
    assert "Written" not in {type(entry).__name__ for entry in again.backing.log}


async def test_it_may_keep_its_clusters() -> None:
    two = Two(await started())
    await two.commit(keep=True)
    opened = await judge(bytes(two.overlay.bytes), bytes(two.backing.bytes))
    assert {run.offset == MISSING for run in await runs_of(opened)} == {True, False}
    again = Two(bytes(two.overlay.bytes), bytes(two.backing.bytes))
    assert await again.commit() == Committed(DATA, ZEROS, 0)


async def test_after_a_cut_the_image_reads_the_same_and_the_pin_counts() -> None:
    rng = random.Random(5)
    two = Two(await started())
    await two.commit()
    seen = set()
    for number, (overlay, backing) in enumerate(two.states(rng)):
        opened = await judge(overlay, backing)
        seen.add((opened.record.committing, opened.record.pin is not None and opened.record.pin.last_modified))
        if number % 5 == 0:  # the same command goes on
            again = Two(overlay, backing)
            await again.commit()
            assert bytes(again.backing.bytes) == wanted()
            ended = await judge(bytes(again.overlay.bytes), wanted())
            assert [run.offset for run in await runs_of(ended)] == [MISSING]
    assert seen == {(False, "old"), (True, None), (False, "new")}


@pytest.mark.parametrize("pinned", [True, False])
async def test_after_a_cut_over_a_qed_image_the_image_reads_the_same(pinned: bool) -> None:
    """A mount reads it, unless it has a backing itself. Then nothing is pinned."""
    two = Two(await started(), qed_base(), qed=True)
    if pinned:
        await two.commit()
    else:
        overlay, target = await open_storage(two.overlay), await two.target()
        await commit_down(overlay, await runs_of(overlay), target, None, lambda _: None, keep=False)
        await target.close()
    for top, below in [*two.states(random.Random(7)), (bytes(two.overlay.bytes), bytes(two.backing.bytes))]:
        opened, disk = await open_storage(MemoryStorage(top)), await disk_of(below)
        assert await read_all(opened, disk.ljust(SIZE, b"\0")) == wanted()
        pin = opened.record.pin
        if not pinned:
            assert pin is None or pin.last_modified == "old"
        elif pin is None or pin.last_modified is None:
            assert pin is not None
            assert opened.record.committing
            assert not await differs(pin, below)
        else:
            assert below == {"old": qed_base(), "new": bytes(two.backing.bytes)}[pin.last_modified]
    assert (disk, pin is None) == (wanted(), not pinned)


async def test_a_note_of_a_commit_ends_with_the_backing() -> None:
    storage = MemoryStorage(await started())
    overlay = await open_storage(storage)
    ends: list[Callable[[], Awaitable[None]]] = [partial(overlay.move_backing, "elsewhere", None), overlay.detach]
    for end in ends:
        await overlay.change_record(lambda record: dataclasses.replace(record, committing=True))
        await end()
        assert not overlay.record.committing


async def never(self: object) -> None:
    """Take the place of a step."""


def no_note(change: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def changed(self: Overlay, to: Callable[..., object]) -> None:
        if "begun" not in to.__code__.co_names:
            await change(self, to)

    return changed


def cut_first(self: Session) -> None:
    """`Session._drop_clusters` without its barrier."""
    geometry, first = self.header.geometry, self.header.l1_table_offset
    self._storage.write(first, [bytes(geometry.table_bytes)])
    self._storage.resize(first + geometry.table_bytes)


RULES = {
    "the backing is durable before the entries go": (RawTarget, "sync", never),
    "the record says that a commit is going on": (Overlay, "change_record", no_note(Overlay.change_record)),
    "the entries go before what they refer to": (Session, "_drop_clusters", cut_first),
}


@pytest.mark.parametrize("rule", RULES)
async def test_each_rule_is_necessary(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*RULES[rule])
    two = Two(await started())
    await two.commit()
    monkeypatch.undo()

    async def judge_all() -> None:
        for overlay, backing in two.states(random.Random(6), 12):
            await judge(overlay, backing)

    with pytest.raises((Broken, QedfsError)):
        await judge_all()


@pytest.mark.parametrize("kind", ["read", "write", "resize", "barrier"])
@pytest.mark.parametrize("which", ["overlay", "backing"])
async def test_a_disk_that_fails_costs_nothing(kind: str, which: str) -> None:
    made = await started()
    for nth in range(1, 12):
        two = Two(made)
        failing: RecordingStorage = getattr(two, which)
        failing.fail(kind, QedfsError("the disk is broken"), nth=nth)
        with contextlib.suppress(QedfsError):
            await two.commit()
        await judge(bytes(two.overlay.bytes), bytes(two.backing.bytes))
        again = Two(bytes(two.overlay.bytes), bytes(two.backing.bytes))
        await again.commit()
        assert bytes(again.backing.bytes) == wanted()


async def test_a_dry_run_counts_and_writes_nothing() -> None:
    storage = MemoryStorage(BASE, writable=False)
    overlay = await open_storage(MemoryStorage(await started(), writable=False))
    target, result, steps = RawTarget(storage, lambda: None, dry=True), Committed(), list[int]()
    await copy(overlay, await runs_of(overlay), target, steps.append, result)
    assert (result, sum(steps)) == (Committed(DATA, ZEROS, CHANGED, SIZE - len(BASE)), DATA + ZEROS)
    assert storage.bytes == BASE


async def test_what_was_activated_cannot_be_taken_back_any_more() -> None:
    storage = MemoryStorage(await started())
    overlay = await open_storage(storage)
    await overlay.change_record(lambda record: dataclasses.replace(record, standby=Standby.REVOCABLE))
    await overlay.close()
    two = Two(bytes(storage.bytes))
    await two.commit()
    assert (await open_storage(MemoryStorage(two.overlay.bytes))).record.standby is Standby.ACTIVE


def test_looks_are_spread_over_what_is_missing() -> None:
    assert list(_looks([(0, 100), (4096, -4096)])) == [(0, 100)]
    ranges = [(n << 20, 300_000) for n in range(100)]
    found = list(_looks(ranges))
    assert LOOKS <= len(found) <= LOOKS + 2
    assert len({pos >> 20 for pos, _ in found}) == len(found)
    assert all(pos % BLOCK_BYTES < BLOCK_BYTES and pos + size <= (pos >> 20 << 20) + 300_000 for pos, size in found)
    one = list(_looks([(0, 1 << 30)]))
    assert [pos for pos, _ in one] == list(range(0, 1 << 30, 1 << 25))
