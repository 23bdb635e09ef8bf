"""A commit of a served image: power cuts of both disks beside a guest, each rule, and what readers get meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from qedfs.errors import InUse, QedfsError, SourceChanged, UsageError
from qedfs.format.record import digest
from qedfs.format.tables import MISSING, ZERO
from qedfs.image import live_commit
from qedfs.image.commit_target import RawTarget
from qedfs.image.growth import grow
from qedfs.image.live_commit import LOOKS_FOR_OTHERS, LiveCommit
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.source.url import parse_location
from tests.fakes.storage import MemoryStorage
from tests.harness.sample import sample
from tests.image.commits import BASE, CLUSTER, OWN, SIZE, Two, differs, runs_of, started, wanted
from tests.image.live import commit_beside, guest, image_of, read_after_a_failure, steps
from tests.model import SectorModel
from tests.overlay.examine import Broken
from tests.overlay.images import BACKING
from tests.overlay.scenario import process, read_all


async def judge(overlay: bytes, backing: bytes, two: Two, model: SectorModel, moment: int) -> None:
    """Raise Broken unless the image is legal, and a mount takes the backing for the version that it is."""
    opened = await open_storage(MemoryStorage(overlay))
    if fault := model.fault(await read_all(opened, backing[:SIZE].ljust(SIZE, b"\0")), moment):
        raise Broken(fault)
    pin = opened.record.pin
    if pin is None or pin.backing != digest(BACKING.decode()):
        raise Broken("the pin was lost")
    longer = opened.record.committing and pin.size < len(backing) <= SIZE  # as in image/pin.py
    if len(backing) != pin.size and not longer:
        raise Broken("the backing is of another size than its pin")
    if pin.last_modified is not None and backing != {"old": BASE, "new": bytes(two.backing.bytes)}[pin.last_modified]:
        raise Broken(f"the backing is not what the pin says, {pin.last_modified}")
    if pin.last_modified is None:
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


@pytest.mark.parametrize("seed", range(sample(2, whole=40)))
async def test_after_a_cut_beside_a_guest_the_image_is_legal_and_the_pin_counts(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Two(await started())
    model = await commit_beside(two, monkeypatch, seed=seed, writes=8)
    assert await judge_all(two, model, seed) > 100


async def test_without_a_guest_the_overlay_is_empty_and_the_backing_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(await started())
    await commit_beside(two, monkeypatch, seed=1, writes=0)
    assert bytes(two.backing.bytes) == wanted()
    opened = await open_storage(MemoryStorage(two.overlay.bytes))
    assert [run.offset for run in await runs_of(opened)] == [MISSING]
    assert (opened.record.committing, opened.record.pin and opened.record.pin.last_modified) == (False, "new")


async def never(*_: object) -> None:
    """Take the place of a step."""


async def changed_but_not_begun(self: Overlay, to: Callable[..., Any], **_: object) -> None:
    if "begun" not in to.__code__.co_names:
        await change_record(self, to)


change_record = Overlay.change_record

RULES: dict[str, tuple[object, str, object]] = {
    "the record says that a commit is going on": (Overlay, "change_record", changed_but_not_begun),
    "the backing is durable before the entries go": (RawTarget, "sync", never),
    "the pin is durable before the entries go": (live_commit, "store_pin", never),
}


@pytest.mark.parametrize("rule", RULES)
async def test_each_rule_is_necessary(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(await started())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*RULES[rule])
        model = await commit_beside(two, monkeypatch, seed=6, writes=0)
    with pytest.raises((Broken, QedfsError)):
        await judge_all(two, model, 6, 12)


@pytest.mark.parametrize("left_alone", [True, False])
async def test_the_backing_stays_as_the_samples_say(left_alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)
        await commit.begin()
        written = bytearray(wanted())
        for cluster in commit._sampled:
            written[cluster * CLUSTER : cluster * CLUSTER + 512] = b"g" * 512
            await image.write(cluster * CLUSTER, b"g" * 512)
        if not left_alone:
            commit._sampled.clear()
        await commit.copy(0, 40)
        for first in range(40):
            await commit.copy(first, 1)
        await commit.leave()
        if left_alone:
            assert bytes(await image.read(0, SIZE)) == written
        else:
            with pytest.raises(SourceChanged, match="differ"):
                await image.read(0, SIZE)


async def test_what_is_missing_is_read_while_the_backing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)
        before = bytes(await image.read(10 * CLUSTER, CLUSTER))
        await commit.begin()
        assert (image.copy_on_read, image.overlay.record.committing) == (False, True)
        await commit.copy(0, 40)
        assert bytes(await image.read(11 * CLUSTER, CLUSTER)) == BASE[11 * CLUSTER : 12 * CLUSTER]
        assert bytes(await image.read(10 * CLUSTER, CLUSTER)) == before == BASE[10 * CLUSTER : 11 * CLUSTER]
        assert image.overlay.record.committing  # after a check of the version, too
        await commit.leave()
        assert (image.copy_on_read, bytes(await image.read(0, SIZE))) == (True, wanted())


async def test_a_cancelled_one_leaves_the_image_as_it_was_and_another_one_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image:
        first = LiveCommit(image)
        await first.begin()
        await first.copy(0, 6)
        await first.leave()
        assert image.overlay.record.committing
        assert bytes(await image.read(0, SIZE)) == wanted()
        await image.source_size()
        pin = image.overlay.record.pin
        assert pin is not None
        assert (pin.last_modified, image.overlay.record.committing) == ("new", False)
        second = LiveCommit(image)
        await second.begin()
        await steps(second, image)
        await second.leave()
        assert bytes(await image.read(0, SIZE)) == wanted()
    assert bytes(two.backing.bytes) == wanted()


async def test_the_overlay_may_keep_its_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image:
        before = await runs_of(image.overlay)
        commit = LiveCommit(image)
        await commit.begin()
        await steps(commit, image, keep=True)
        await commit.leave()
        assert await runs_of(image.overlay) == before
    assert bytes(two.backing.bytes) == wanted()


@pytest.mark.parametrize("kind", ["read", "write", "barrier"])
@pytest.mark.parametrize("which", ["overlay", "backing"])
async def test_a_disk_that_fails_costs_nothing(kind: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await started()
    for nth in range(1, 8):
        two = Two(made)
        assert await read_after_a_failure(two, which, kind, nth, monkeypatch) == wanted()


async def test_what_cannot_be_committed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(await started())
    async with image_of(two, monkeypatch) as image:
        own, image.own_backing = image.own_backing, None
        with pytest.raises(UsageError, match="has no source"):
            LiveCommit(image)
        image.own_backing = own
        assert image.fetch is not None
        with monkeypatch.context() as patch:
            patch.setattr(image.fetch.remote, "location", parse_location("http://server/base.raw"))
            with pytest.raises(UsageError, match="is on a server, and only read"):
                LiveCommit(image)
        with monkeypatch.context() as patch:
            patch.setattr(type(own), "is_linked", True)
            with pytest.raises(InUse, match="another image of this mount has it"):
                await LiveCommit(image).begin()
        monkeypatch.setattr(type(own), "shared", True)
        with pytest.raises(InUse, match="another image of this mount has it"):
            LiveCommit(image)


@pytest.mark.parametrize("last", [b"o" * CLUSTER, ZERO])
async def test_what_the_backing_has_past_the_image_stays(last: bytes | int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 10 * CLUSTER + 512
    two = Two(await started({2: b"o" * CLUSTER, 10: last}, size=size))
    async with image_of(two, monkeypatch) as image:
        before = bytes(await image.read(0, size))
        commit = LiveCommit(image)
        await commit.begin()
        await steps(commit, image)
        await commit.leave()
        assert [run.offset for run in await runs_of(image.overlay)] == [MISSING]
        assert bytes(await image.read(0, size)) == before
    assert bytes(two.backing.bytes) == before + BASE[size:]


async def test_the_image_may_grow_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    size, larger = 10 * CLUSTER + 512, 20 * CLUSTER
    own: dict[int, bytes | int] = {2: b"o" * CLUSTER, 10: (b"o" * 512).ljust(CLUSTER, b"\0")}
    two = Two(await started(own, size=size, backing_size=size), BASE[:size])
    async with image_of(two, monkeypatch) as image:
        commit = LiveCommit(image)
        await commit.begin()
        await grow(image, larger)
        await image.write(12 * CLUSTER, b"g" * 512)
        before = bytes(await image.read(0, larger))
        await steps(commit, image)
        await commit.leave()
        assert bytes(await image.read(0, larger)) == before


async def test_guests_go_on_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(await started())
    model = SectorModel(wanted())
    async with image_of(two, monkeypatch) as image:
        for seed in range(2):
            commit = LiveCommit(image)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest, image, two, model, random.Random(seed), 6)
                await commit.begin()
                await steps(commit, image)
                await commit.leave()
            assert model.fault(bytes(await image.read(0, SIZE)), len(two.moments)) is None


@pytest.mark.parametrize("looks", [LOOKS_FOR_OTHERS - 1, LOOKS_FOR_OTHERS])
async def test_a_read_of_the_old_source_may_end_before_somebody_else_is_blamed(
    looks: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    two = Two(await started())
    failures = iter(range(looks))

    async def in_use(*_: object) -> None:
        if next(failures, None) is not None:
            raise InUse("another program has it open")

    async with image_of(two, monkeypatch) as image:
        monkeypatch.setattr(live_commit, "check_unused", in_use)
        commit = LiveCommit(image)
        if looks == LOOKS_FOR_OTHERS:
            with pytest.raises(InUse):
                await commit.begin()
        else:
            await commit.begin()
            await commit.leave()
        assert bytes(await image.read(0, SIZE)) == wanted()
