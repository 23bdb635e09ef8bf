"""Replay power cuts: run a scenario, cut the power at every position of its log, judge what is left.

Owns the loop over positions and states and the reproducible case of a failure. The history comes from `scenario.py`,
the states from `cuts.py`, the judgement from `examine.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from tests.overlay.cuts import Disk, Piece, Truncation
from tests.overlay.examine import Broken, examine, read_content
from tests.overlay.runs import run_again, run_seed
from tests.overlay.scenario import History, process, repeatable


class Failure(NamedTuple):
    """One state that broke a promise, small enough to be kept: the seed repeats the history."""

    seed: int
    cut: Truncation
    text: str

    def save(self, folder: Path) -> Path:
        """Write the case to a file that `load` reads."""
        path = folder / f"powercut-{self.seed}-{self.cut.position}.json"
        path.write_text(json.dumps(self._asdict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Failure:
        """Read a saved case."""
        seed, cut, text = json.loads(path.read_text()).values()
        position, pieces, size, garbage = cut
        return cls(seed, Truncation(position, tuple(Piece(*piece) for piece in pieces), size, garbage), text)


class Tally(NamedTuple):
    """What a replay has seen."""

    states: int
    failures: list[Failure]


def replay(seed: int, *, most: int, per_position: int = 4, stop: bool = False, twice: int = 0) -> Tally:
    """Replay at most `most` states of the scenario of a seed, spread over its positions.

    Args:
        per_position: states taken at each position.
        stop: end at the first failure.
        twice: let one state in so many be worked on until a second crash; 0: none.
    """
    history = run_seed(seed)
    with repeatable(seed):
        return trio.run(_replay, history, most, per_position, stop, twice)


def reproduce(failure: Failure) -> str | None:
    """Replay one saved state; what is wrong with it now, or None."""
    history = run_seed(failure.seed)
    if history.misreads:
        return history.misreads[0]
    disk = Disk(history.storage.start, history.storage.log)
    disk.advance(failure.cut.position)
    try:
        trio.run(examine, disk.build(failure.cut), history, failure.cut.position, random.Random(failure.seed))
    except Broken as broken:
        return str(broken)
    return None


def states(history: History, per_position: int, rng: random.Random) -> Iterator[tuple[Truncation, bytearray]]:
    """States of a history in order of position; a position at which nothing has happened since is left out."""
    disk = Disk(history.storage.start, history.storage.log)
    for position in range(len(history.storage.log) + 1):
        disk.advance(position)
        for cut in disk.cuts(per_position, rng):
            yield cut, disk.build(cut)


async def _replay(history: History, most: int, per_position: int, stop: bool, twice: int) -> Tally:
    seed = history.scenario.seed
    rng = random.Random(seed)
    failures = [Failure(seed, Truncation(0, (), 0, garbage=False), text) for text in history.misreads]
    count = 0
    for cut, image in states(history, per_position, rng):
        if count >= most or (stop and failures):
            break
        count += 1
        try:
            with process():
                await examine(image, history, cut.position, rng)
            if twice and rng.randrange(twice) == 0:
                count += await _crash_again(image, history, rng)
        except Broken as broken:
            failures.append(Failure(seed, cut, str(broken)))
    return Tally(count, failures)


async def _crash_again(image: bytearray, history: History, rng: random.Random) -> int:
    """Work on with a state and cut the power again, at every position once; returns the number of states."""
    scenario = history.scenario
    content = await read_content(image, scenario.base)
    second = await run_again(image, content, scenario, rng.randrange(1 << 30))
    count = 0
    for cut, again in states(second, 1, rng):
        count += 1
        try:
            with process():
                await examine(again, second, cut.position, rng)
        except Broken as broken:
            raise Broken(f"{broken} (after a second crash at position {cut.position})") from broken
    return count
