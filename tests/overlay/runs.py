"""Plays a scenario on a recording file: to its end, or up to moments in which the process is killed.

Owns the order of a run: an overlay is opened, several tasks at once write (whole clusters, parts, over each other),
adopt, adopt zeros, discard, move, drop, flush, commit and store records; some close and open again, some end with a
detach, some meet a full disk. Must not know what a task does (`actors.py`).
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import trio

from qedfs.errors import QedfsError
from tests.fakes.storage import RecordingStorage
from tests.model import SectorModel
from tests.overlay.actors import Actors
from tests.overlay.scenario import BACKING_NAME, History, Scenario, dirty_image, fresh_image, repeatable


async def run(scenario: Scenario) -> History:
    """Run a scenario to its end, or to the first error that no full disk explains."""
    history = _history(scenario)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        try:
            await _all_of_it(Actors(history, random.Random(scenario.seed + 1), Path(folder)))
        except* QedfsError as group:
            history.misreads.append(f"it met an error while it ran: {group.exceptions[0]!r}")
    return history


class Kill(NamedTuple):
    """What a process that was killed has left: the file, its journal, and when that was (an event of the model)."""

    image: bytes
    journals: dict[str, bytes]  # by file name
    at: int


async def run_and_kill(scenario: Scenario, chance: float) -> tuple[History, list[Kill]]:
    """Run a scenario and keep what a SIGKILL would leave, before one operation in so many."""
    # Its oracle takes a write for safe when it returns, which a disk that fails revokes.
    history = _history(dataclasses.replace(scenario, bad_barrier=0, killed=""))
    model = history.model
    model.on_return = True
    kills: list[Kill] = []
    rng = random.Random(scenario.seed + 2)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:

        def perhaps() -> None:
            if rng.random() < chance:
                left = {path.name: path.read_bytes() for path in Path(folder).glob("disk-*")}
                kills.append(Kill(bytes(history.storage.bytes), left, model.events))

        history.storage.before_step = perhaps
        await _all_of_it(Actors(history, random.Random(scenario.seed + 1), Path(folder), lambda: model.events))
    return history, kills


def _history(scenario: Scenario) -> History:
    backing = BACKING_NAME if scenario.backed else None
    start = dirty_image(scenario.geometry) if scenario.dirty else fresh_image(scenario.geometry, backing)
    storage = RecordingStorage(start, name="disk" if scenario.journal else "", seed=scenario.seed)
    return History(scenario, storage, SectorModel(scenario.base))


async def _all_of_it(actors: Actors) -> None:
    await actors.open()
    actors.meet_full_disk()
    actors.meet_bad_disk()
    await actors.together()
    await (actors.die() if actors.history.scenario.killed else actors.reopen())
    actors.meet_bad_disk()
    if actors.history.scenario.detach:
        await actors.stream_all()
        # Where no guest has written in this session, no note of that brings a barrier.
        await actors.guest(3 * (actors.history.scenario.seed % 2))
        await actors.detach()
    await actors.together()
    if actors.history.failed:
        await actors.reopen()
        await actors.together()
    await actors.close()


async def run_again(image: bytes | bytearray, content: bytes, scenario: Scenario, seed: int) -> History:
    """Go on with what a crash has left, and what was read from it: the history of the time until a second crash."""
    storage = RecordingStorage(image, seed=seed)
    history = History(scenario, storage, SectorModel(content), fresh=False)
    actors = Actors(history, random.Random(seed))
    await actors.open()
    await actors.together()
    await actors.close()
    return history


def run_seed(seed: int) -> History:
    """Draw and run the scenario of a seed, the same way each time."""
    with repeatable(seed):
        return trio.run(run, Scenario.draw(seed))
