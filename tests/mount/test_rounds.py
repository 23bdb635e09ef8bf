"""The rounds: an image that has nothing to do costs a look, one that waits for its disk delays no other."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import trio

from qedfs.errors import BadOverlay
from qedfs.image.commit_schedule import COMMIT_SECONDS
from qedfs.image.image import Image
from qedfs.mount.rounds import RESTING_AT_ONCE, RESTING_ROUNDS, ROUND_SECONDS, Rounds, Visited
from qedfs.mount.served import Served
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from tests.harness.hang import HANG_SECONDS

CLUSTER = 65536
OLD_NS = 3600 * 10**9
LOOKS = 10


class Inspections:
    """Counts the inspections of an image, and keeps what they found."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.count = 0
        self.error: BadOverlay | None = None
        self.done = trio.Event()

    async def inspect(self) -> bool:
        self.count += 1
        try:
            await self._image.overlay.inspect()
        except BadOverlay as exc:
            self.error = exc
        self.done.set()
        return self.error is None


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Image]:
    """A complete image in a new overlay."""
    create_overlay(str(path), image_size=16 * CLUSTER, backing=None)
    image = Image(path.stem, await open_overlay(str(path), writable=True, journal_folder=path.parent), None)
    try:
        yield image
    finally:
        with contextlib.suppress(BadOverlay):  # of a test that damages it
            await image.close()


def visit(image: Image, nursery: trio.Nursery, *, always: bool = False) -> tuple[Visited, Inspections]:
    inspections = Inspections(image)
    return Visited(of(image, set()), image, nursery, inspections.inspect, always=always), inspections


async def look(visited: Visited, inspections: Inspections) -> int:
    """Look LOOKS times, and wait for the inspections. Returns how many there were."""
    before = inspections.count
    for _ in range(LOOKS):
        inspections.done = trio.Event()
        known = inspections.count
        visited.look()
        await trio.testing.wait_all_tasks_blocked()
        if inspections.count > known:
            with trio.fail_after(HANG_SECONDS):
                await inspections.done.wait()
            await trio.testing.wait_all_tasks_blocked()
    return inspections.count - before


async def test_a_file_that_nobody_changes_is_not_inspected_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.overlay.open_session.MARK_AGE_NS", OLD_NS)
    async with opened(tmp_path / "disk.qed") as image, trio.open_nursery() as nursery:
        seen = visit(image, nursery)
        # A change right after the last one could leave the times as they are.
        assert await look(*seen) == LOOKS
        monkeypatch.setattr("qedfs.overlay.open_session.MARK_AGE_NS", -OLD_NS)
        assert await look(*seen) == 1
        assert await look(*visit(image, nursery, always=True)) == LOOKS
        # Our own writes change it, too.
        await image.write(0, b"x" * CLUSTER)
        assert await look(*seen) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("same_size", [True, False])
async def test_what_another_program_writes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, same_size: bool
) -> None:
    monkeypatch.setattr("qedfs.overlay.open_session.MARK_AGE_NS", -OLD_NS)
    path = tmp_path / "disk.qed"
    async with opened(path) as image, trio.open_nursery() as nursery:
        visited, inspections = visit(image, nursery)
        await look(visited, inspections)
        assert await look(visited, inspections) == 0
        if same_size:
            with path.open("r+b") as file:
                file.write(b"QED\0" + bytes(60))
        else:
            os.truncate(path, CLUSTER)
        assert await look(visited, inspections) == 1  # and none any more after that
        assert inspections.error is not None
        nursery.cancel_scope.cancel()


async def test_an_image_is_tended_while_it_has_something_to_do(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tended: Counter[str] = Counter()

    async def tend(image: Image) -> None:
        tended[image.name] += 1
        if image.name == "stuck":
            await trio.sleep_forever()

    monkeypatch.setattr(Image, "tend", tend)
    monkeypatch.setattr(Image, "calm", property(lambda image: image.name == "calm"))
    rounds = Rounds(set())
    async with contextlib.AsyncExitStack() as stack:
        images = [
            await stack.enter_async_context(opened(tmp_path / f"{name}.qed")) for name in ("calm", "busy", "stuck")
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rounds.run)
            for image in images:
                rounds.add(visit(image, nursery)[0])
            await trio.sleep(LOOKS * COMMIT_SECONDS + ROUND_SECONDS / 2)
            nursery.cancel_scope.cancel()
    assert tended == {"busy": LOOKS, "stuck": 1}


async def test_an_image_is_calm_once_its_writes_are_committed(tmp_path: Path) -> None:
    async with opened(tmp_path / "disk.qed") as image:
        calm = [image.calm]
        await image.write(0, b"x" * CLUSTER)
        calm.append(image.calm)
        await image.tend()
        assert [*calm, image.calm] == [True, False, True]


class Resting:
    """Stands for an image: complete, nothing to commit, its file unchanged. Counts the looks at the file."""

    source = None
    in_standby = False
    complete = calm = True

    def __init__(self) -> None:
        self.name = "disk"
        self.condition = self.overlay = self
        self.looks = 0

    def clear(self, _: object) -> None: ...

    @property
    def seems_unchanged(self) -> bool:
        self.looks += 1
        return True


async def test_images_that_rest_take_turns(autojump_clock: trio.testing.MockClock) -> None:
    count = 2 * RESTING_ROUNDS * RESTING_AT_ONCE
    opened: set[Served] = set()
    images = [Resting() for _ in range(count)]

    def looks() -> Counter[int]:
        return Counter(image.looks for image in images)

    async with trio.open_nursery() as nursery:
        rounds = Rounds(opened)
        nursery.start_soon(rounds.run)
        visits = [Visited(of(image, opened), cast("Image", image), nursery, never, always=False) for image in images]
        for one in visits:
            rounds.add(one)
        await trio.sleep(1.5 * ROUND_SECONDS)
        assert looks() == {1: count}
        await trio.sleep(ROUND_SECONDS)
        assert looks() == {1: count - count // RESTING_ROUNDS, 2: count // RESTING_ROUNDS}
        await trio.sleep((RESTING_ROUNDS - 1) * ROUND_SECONDS)
        assert looks() == {2: count}
        # One that is open is visited in every round, and one that was left out in none.
        visits[0].served.note_open()
        rounds.leave_out(visits[1])
        await trio.sleep(2 * RESTING_ROUNDS * ROUND_SECONDS)
        assert images[0].looks == 2 + 2 * RESTING_ROUNDS
        assert images[1].looks == 2
        visits[0].served.note_release()
        await trio.sleep(2 * RESTING_ROUNDS * ROUND_SECONDS)
        assert images[0].looks <= 2 + 2 * RESTING_ROUNDS + 3
        nursery.cancel_scope.cancel()


async def test_what_was_written_by_who_has_closed_it_again_is_committed_as_soon_as_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    waking: set[Served] = set()
    images = [Resting() for _ in range(RESTING_AT_ONCE * RESTING_ROUNDS * 2)]
    async with trio.open_nursery() as nursery:
        rounds = Rounds(waking)
        nursery.start_soon(rounds.run)
        visits = [Visited(of(image, waking), cast("Image", image), nursery, never, always=False) for image in images]
        for one in visits:
            rounds.add(one)
        await trio.sleep(1.5 * ROUND_SECONDS)
        visits[-1].served.note_open()
        visits[-1].served.note_release()
        await trio.sleep(ROUND_SECONDS)
        assert images[-1].looks == 2
        nursery.cancel_scope.cancel()


async def test_a_few_images_that_rest_are_all_visited_in_each_round(autojump_clock: trio.testing.MockClock) -> None:
    images = [Resting() for _ in range(RESTING_AT_ONCE)]
    async with trio.open_nursery() as nursery:
        rounds = Rounds(set())
        nursery.start_soon(rounds.run)
        for image in images:
            rounds.add(Visited(of(image, set()), cast("Image", image), nursery, never, always=False))
        await trio.sleep((LOOKS + 0.5) * ROUND_SECONDS)
        assert {image.looks for image in images} == {LOOKS}
        nursery.cancel_scope.cancel()


def of(image: Resting | Image, opened: set[Served]) -> Served:
    return Served(image.name, f"/{image.name}.qed", 2, (1, 1, 1), cast("Image", image), opened=opened)


async def never() -> bool:
    raise AssertionError("inspected")
