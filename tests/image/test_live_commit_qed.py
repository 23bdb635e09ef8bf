"""A commit of a served image into a QED image: power cuts of both disks beside a guest, and what readers get meanwhile.

The backing is read after a cut as a mount reads it: by its tables alone, whatever its record says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio

from qedfs.errors import QedfsError, SourceChanged, UsageError
from qedfs.format.header import NEED_CHECK
from qedfs.format.record import digest
from qedfs.format.tables import MISSING
from qedfs.image import live_commit
from qedfs.image.image import Image
from qedfs.image.live_commit import LiveCommit
from qedfs.image.qed_target import QedTarget
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage, RecordingStorage
from tests.harness.sample import sample
from tests.image.commits import (
    BASE,
    CLUSTER,
    OWN,
    SIZE,
    Two,
    differs,
    disk_of,
    qed_base,
    runs_of,
    started_over_qed,
    wanted,
)
from tests.image.live import Fails, commit_beside, image_of, read_after_a_failure, steps
from tests.image.test_live_commit import change_record, changed_but_not_begun
from tests.model import SectorModel
from tests.overlay.examine import Broken
from tests.overlay.images import BACKING
from tests.overlay.scenario import process, read_all


async def judge(overlay: bytes, backing: bytes, two: Two, model: SectorModel, moment: int) -> None:
    """Raise Broken unless the image is legal, and a mount takes the backing for the version that it is."""
    opened, disk = await open_storage(MemoryStorage(overlay)), await disk_of(backing)
    if fault := model.fault(await read_all(opened, disk[:SIZE].ljust(SIZE, b"\0")), moment):
        raise Broken(fault)
    pin = opened.record.pin
    if pin is None or pin.backing != digest(BACKING.decode()):
        raise Broken("the pin was lost")
    if len(disk) != pin.size and not (opened.record.committing and pin.size < len(disk) <= SIZE):
        raise Broken("the backing is of another size than its pin")
    if pin.last_modified is not None:
        version = {"old": two.backing.start, "new": bytes(two.backing.bytes)}[pin.last_modified[:3]]
        if backing != version:
            raise Broken(f"the backing is not what the pin says, {pin.last_modified}")
        return
    if await differs(pin, backing):
        raise Broken("the samples differ")
    runs = [await opened.map(cluster * CLUSTER, CLUSTER) for cluster in OWN]
    if any(run.offset == MISSING for (run,) in runs):
        raise Broken("it needs a backing of which nothing but samples is known")


async def judge_all(two: Two, model: SectorModel, seed: int, most: int = 2) -> int:
    count = 0
    for moment, overlay, backing in two.states_at(random.Random(seed), most):
        with process():
            await judge(overlay, backing, two, model, moment)
        count += 1
    return count


@pytest.mark.parametrize("cluster_size", [CLUSTER, 2 * CLUSTER])
@pytest.mark.parametrize("seed", range(sample(1, whole=20)))
async def test_after_a_cut_beside_a_guest_the_image_is_legal_and_the_pin_counts(
    seed: int, cluster_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = await started_over_qed(qed_base(cluster_size))
    model = await commit_beside(two, monkeypatch, seed=seed, writes=8)
    assert await judge_all(two, model, seed) > 100


targets: list[QedTarget] = []


def noted(self: QedTarget) -> None:
    """Take the place of `QedTarget.check_settled`."""
    targets.append(self)


async def begun_too_early(self: Overlay, to: Callable[..., Any], **_: object) -> None:
    if "begun" in to.__code__.co_names:
        await targets[-1].begin()
    await change_record(self, to)


def not_durable(self: Two) -> RecordingStorage:
    self.backing.closed = False
    return self.backing


async def never(*_: object) -> None:
    """Take the place of a step."""


RULES: dict[str, list[tuple[object, str, object]]] = {
    "the record says that a commit is going on": [(Overlay, "change_record", changed_but_not_begun)],
    "the record says so before the session begins": [
        (QedTarget, "check_settled", noted),
        (Overlay, "change_record", begun_too_early),
    ],
    "the end of the session is durable before the pin": [(Two, "_reopened", not_durable)],
    "the pin is durable before the entries go": [(live_commit, "store_pin", never)],
}


@pytest.mark.parametrize("rule", RULES)
async def test_each_rule_is_necessary(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = await started_over_qed()
    with pytest.MonkeyPatch.context() as patch:
        for place in RULES[rule]:
            patch.setattr(*place)
        model = await commit_beside(two, monkeypatch, seed=6, writes=0)
    with pytest.raises((Broken, QedfsError)):
        await judge_all(two, model, 6, 12)


async def test_without_a_guest_the_overlay_is_empty_and_the_backing_whole_and_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = await started_over_qed()
    await commit_beside(two, monkeypatch, seed=1, writes=0)
    assert await disk_of(bytes(two.backing.bytes)) == wanted()
    opened = await open_storage(MemoryStorage(two.overlay.bytes))
    assert [run.offset for run in await runs_of(opened)] == [MISSING]
    pin = opened.record.pin
    assert pin is not None
    assert (opened.record.committing, pin.size, (pin.last_modified or "")[:4]) == (False, SIZE, "new ")
    backing = await open_storage(MemoryStorage(two.backing.bytes, writable=False))
    assert (backing.record.session, backing.record.sequence > 0) == ("", True)
    assert not two.backing.bytes[16] & NEED_CHECK


@pytest.mark.parametrize("left_alone", [True, False])
async def test_the_backing_stays_as_the_samples_say(left_alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    two = await started_over_qed()
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)
        await commit.begin()
        assert commit._sampled
        written = bytearray(wanted())
        for cluster in commit._sampled:
            written[cluster * CLUSTER : cluster * CLUSTER + 512] = b"g" * 512
            await image.write(cluster * CLUSTER, b"g" * 512)
        if not left_alone:
            commit._sampled.clear()
        for first in range(40):
            await commit.copy(first, 1)
        await commit.leave()
        if left_alone:
            assert bytes(await image.read(0, SIZE)) == written
        else:
            with pytest.raises(SourceChanged, match="differ"):
                await image.read(0, SIZE)


def committing(image: Image) -> bool:
    return image.overlay.record.committing


async def test_what_is_missing_is_read_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    two = await started_over_qed()
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)

        async def right() -> None:
            for first in (2, 8, 22, 25):
                pos = first * CLUSTER
                assert bytes(await image.read(pos, CLUSTER)) == wanted()[pos : pos + CLUSTER]

        await right()
        await commit.begin()
        assert image.overlay.record.committing
        await right()
        await commit.copy(0, 40)
        await right()
        await commit.settle()
        await right()
        assert image.copy_on_read
        await commit.leave()
        assert bytes(await image.read(0, SIZE)) == wanted()


async def test_a_cancelled_one_leaves_the_image_as_it_was_and_another_one_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = await started_over_qed()
    async with image_of(two, monkeypatch) as image:
        first = LiveCommit(image)
        await first.begin()
        await first.copy(0, 6)
        await first.leave()
        assert committing(image)
        assert bytes(await image.read(0, SIZE)) == wanted()
        await image.source_size()
        assert not committing(image)
        second = LiveCommit(image)
        await second.begin()
        await steps(second, image)
        await second.leave()
        assert bytes(await image.read(0, SIZE)) == wanted()
    assert await disk_of(bytes(two.backing.bytes)) == wanted()


@pytest.mark.expect_log("disk.raw: its backing: the disk is broken")
@pytest.mark.parametrize("kind", ["read", "write", "barrier"])
@pytest.mark.parametrize("which", ["overlay", "backing"])
async def test_a_disk_that_fails_costs_nothing(kind: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await started_over_qed()
    for nth in range(1, 8):
        two = Two(made.overlay.start, made.backing.start, qed=True)
        assert await read_after_a_failure(two, which, kind, nth, monkeypatch) == wanted()


async def read_on(image: Image) -> None:
    while True:
        assert bytes(await image.read(0, SIZE)) == wanted()
        await trio.lowlevel.checkpoint()


@pytest.mark.expect_log("disk.raw: its backing: cannot sync")
async def test_if_the_end_of_the_session_fails_readers_do_not_notice_and_it_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = await started_over_qed()
    monkeypatch.setattr(two, "_reopened", Fails(two._reopened, QedfsError("cannot sync")))
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)
        await commit.begin()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_on, image)
            with pytest.raises(QedfsError, match="cannot sync"):
                await steps(commit, image)
            assert bytes(await image.read(0, SIZE)) == wanted()
            nursery.cancel_scope.cancel()
        assert (commit.open, image.copy_on_read) == (False, True)
        await commit.begin()
        await steps(commit, image)
        await commit.leave()
        assert [run.offset for run in await runs_of(image.overlay)] == [MISSING]
        assert bytes(await image.read(0, SIZE)) == wanted()
    assert await disk_of(bytes(two.backing.bytes)) == wanted()


@pytest.mark.expect_log("was not closed cleanly; it is read as it is")
async def test_a_backing_that_an_opening_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = bytearray(qed_base())
    dirty[16] |= NEED_CHECK
    two = await started_over_qed(bytes(dirty))
    async with image_of(two, monkeypatch) as image:
        with pytest.raises(UsageError, match=r"/base: was not closed cleanly; unmount the image"):
            await LiveCommit(image).begin()
        assert bytes(await image.read(0, SIZE)) == wanted()
        assert (bytes(two.backing.bytes), image.overlay.record.committing) == (bytes(dirty), False)


def test_the_disk_is_that_of_the_raw_one() -> None:
    assert len(qed_base()) > len(BASE)
