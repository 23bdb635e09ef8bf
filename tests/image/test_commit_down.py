"""A commit of an overlay into its backing: what both files say after a power cut at any moment, or after an error.

The states of the two disks are combined, as each may have lost what the other has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import pytest

from qedfs.errors import QedfsError
from qedfs.format.record import Pin, Standby, digest
from qedfs.format.tables import MISSING, ZERO
from qedfs.image.commit_down import LOOKS, Committed, Pinning, _looks, commit_down, copy
from qedfs.image.commit_target import QedTarget, RawTarget
from qedfs.overlay.clustermap import Run
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import Session
from qedfs.source.samples import BLOCK_BYTES, Samples
from tests.fakes.storage import Entry, MemoryStorage, RecordingStorage
from tests.overlay.cuts import Disk
from tests.overlay.examine import Broken, read_content
from tests.overlay.images import BACKING, empty, filled
from tests.overlay.scenario import read_all

CLUSTER = 4096
SIZE = 40 * CLUSTER
BASE = random.Random(1).randbytes(24 * CLUSTER)  # it ends inside the image
OWN: dict[int, bytes | int] = {
    0: random.Random(2).randbytes(CLUSTER),
    1: ZERO,
    5: random.Random(3).randbytes(CLUSTER),
    7: BASE[7 * CLUSTER : 8 * CLUSTER],  # fetched, and never written
    23: ZERO,
    30: random.Random(4).randbytes(CLUSTER),  # past the end of the backing
    31: ZERO,
}
DATA, ZEROS = 4 * CLUSTER, 3 * CLUSTER
CHANGED = 3 * CLUSTER + 2 * CLUSTER  # the zeros past the end are there already


def wanted() -> bytes:
    """What the image reads as, before and after."""
    image = bytearray(BASE.ljust(SIZE, b"\0"))
    for cluster, content in OWN.items():
        image[cluster * CLUSTER : (cluster + 1) * CLUSTER] = content if isinstance(content, bytes) else bytes(CLUSTER)
    return bytes(image)


class Log(list[Entry]):
    """Notes at each entry how long both logs are."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def append(self, entry: Entry) -> None:
        super().append(entry)
        self._note()


class Two:
    """An overlay and its backing, and the moments of a commit: the lengths of both logs."""

    def __init__(self, overlay: bytes, backing: bytes = BASE) -> None:
        self.overlay, self.backing = RecordingStorage(overlay), RecordingStorage(backing)
        self.moments: list[tuple[int, int]] = []
        for storage in (self.overlay, self.backing):
            storage.log = Log(self._note)

    def _note(self) -> None:
        self.moments.append((len(self.overlay.log), len(self.backing.log)))

    async def commit(self, *, keep: bool = False) -> Committed:
        overlay = await open_storage(self.overlay)
        target = await RawTarget.of(self.backing, lambda: None)

        async def renewed(samples: str) -> Pin:
            return Pin(digest(BACKING.decode()), len(self.backing.bytes), last_modified="new", samples=samples)

        pinning = Pinning(target.read, renewed)
        return await commit_down(overlay, await runs_of(overlay), target, pinning, lambda _: None, keep=keep)

    def states(self, rng: random.Random, most: int = 4) -> Iterator[tuple[bytes, bytes]]:
        """Both files after a power cut."""
        overlay, backing = (Disk(storage.start, storage.log) for storage in (self.overlay, self.backing))
        for places in self.moments:
            overlay.advance(places[0])
            backing.advance(places[1])
            others = list(backing.cuts(most, rng))
            for cut in overlay.cuts(most, rng):
                # Where the backing grew it has holes, never what a deleted file has left.
                other = rng.choice(others)._replace(garbage=False)
                yield bytes(overlay.build(cut)), bytes(backing.build(other))


async def runs_of(overlay: Overlay) -> list[Run]:
    return await overlay.map(0, overlay.image_size)


async def started() -> bytes:
    """An overlay that is pinned to the backing."""
    storage = MemoryStorage(filled(OWN, image_size=SIZE).data)
    overlay = await open_storage(storage)
    pin = Pin(digest(BACKING.decode()), len(BASE), last_modified="old")
    await overlay.change_record(lambda record: dataclasses.replace(record, pin=pin))
    await overlay.close()
    return bytes(storage.bytes)


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


async def differs(pin: Pin, backing: bytes) -> bool:
    samples = Samples.decode(pin.samples)
    assert len(samples)

    async def read(pos: int, view: memoryview) -> None:
        view[:] = backing[pos : pos + len(view)]

    return await samples.difference(read, len(backing)) is not None


async def test_the_backing_gets_what_the_overlay_has_and_the_overlay_is_empty() -> None:
    two = Two(await started())
    assert await two.commit() == Committed(DATA, ZEROS, CHANGED)
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


async def test_after_a_cut_over_another_overlay_the_image_reads_the_same() -> None:
    """Of a QED backing nothing is pinned, as a mount does not read it."""
    parts: dict[int, bytes | int] = {n: BASE[n * CLUSTER : (n + 1) * CLUSTER] for n in range(len(BASE) // CLUSTER)}
    two = Two(await started(), bytes(filled(parts, image_size=len(BASE), backing=b"").data))
    overlay, target = await open_storage(two.overlay), QedTarget("base", await open_storage(two.backing))
    await commit_down(overlay, await runs_of(overlay), target, None, lambda _: None, keep=False)
    await target.close()
    for top, below in [*two.states(random.Random(7)), (bytes(two.overlay.bytes), bytes(two.backing.bytes))]:
        backing = await read_content(below, bytes(SIZE))
        assert await read_all(await open_storage(MemoryStorage(top)), backing.ljust(SIZE, b"\0")) == wanted()
    assert backing == wanted()
    assert (await open_storage(MemoryStorage(top))).record.pin is None


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
        if "_begun" not in to.__code__.co_names:
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
    assert (result, sum(steps)) == (Committed(DATA, ZEROS, CHANGED), DATA + ZEROS)
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
