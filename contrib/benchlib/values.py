"""The words of the bench, as plain values: an outcome, a unit, a target, a row. No I/O."""

from __future__ import annotations

import dataclasses
import enum
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from .figures import TWICE, WIRE
from .lab import Lab

# Names of contenders; a row may have others.
QEDFS = "qedfs"
QEMU = "qemu"
NBDKIT = "nbdkit"
LIMIT = "limit"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run of one contender.

    `value` is in the row's unit. `figures` are by-products in units of their own, which their names tell. `scaled` says
    that only a part of the row's work was done; `value` is what the whole would give.
    """

    value: float
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scaled: bool = False


class Unit(enum.Enum):
    """What a row counts, and whether more of it is better."""

    MB_PER_SECOND = ("MB/s", True)  # 10^6 bytes
    IOPS = ("IOPS", True)
    MILLISECONDS = ("ms", False)
    SECONDS = ("s", False)
    PER_GIB = ("per GiB", False)

    def __init__(self, label: str, higher_is_better: bool) -> None:
        self.label = label
        self.higher_is_better = higher_is_better

    def advantage(self, ours: float, theirs: float) -> float:
        """How many times better `ours` is."""
        better, worse = (ours, theirs) if self.higher_is_better else (theirs, ours)
        return better / worse if worse else float("inf")


@dataclasses.dataclass(frozen=True)
class Target:
    """What qedfs ought to reach.

    With `against`, `bound` is a ratio of values, qedfs to that contender: at least where more is better, else at most.
    With `figure`, it is the most that qedfs's by-product of that name may be. With neither, it is a value in the row's
    unit.
    """

    bound: float
    against: str = ""
    figure: str = ""


# What fetching may cost, whatever the link.
FRUGAL = (Target(1.01, figure=WIRE), Target(0, figure=TWICE))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A target and what was reached; `met` is None if nothing was measured to compare."""

    target: Target
    reached: float | None
    met: bool | None


Contender = Callable[[], Outcome]
Contenders = Mapping[str, Contender]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table. `prepare` sets up what its contenders share and gives them by name."""

    name: str
    title: str
    unit: Unit
    prepare: Callable[[Lab], AbstractContextManager[Contenders]]
    targets: Sequence[Target] = ()
    note: str = ""
    # The most runs that make sense where one is long, or does not wobble.
    runs: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs of one contender in one row; `error` is what ended them early."""

    outcomes: Sequence[Outcome]
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(outcome.value for outcome in self.outcomes)

    @property
    def spread(self) -> float:
        """Largest minus smallest value, as a part of the median."""
        values = [outcome.value for outcome in self.outcomes]
        return (max(values) - min(values)) / self.median if self.median else 0.0

    @property
    def scaled(self) -> bool:
        return any(outcome.scaled for outcome in self.outcomes)

    def figures(self) -> dict[str, float]:
        """The median of each by-product."""
        names = dict.fromkeys(name for outcome in self.outcomes for name in outcome.figures)
        return {
            name: statistics.median(outcome.figures[name] for outcome in self.outcomes if name in outcome.figures)
            for name in names
        }


@dataclasses.dataclass(frozen=True)
class RowResult:
    """A row that was measured."""

    row: Row
    results: Mapping[str, Result]
    load_average: float
    seconds: float

    def verdicts(self) -> list[Verdict]:
        """What became of each target of the row."""
        return [self._verdict(target) for target in self.row.targets]

    def _verdict(self, target: Target) -> Verdict:
        reached = self._reached(target)
        if reached is None:
            return Verdict(target, None, None)
        at_least = self.row.unit.higher_is_better and not target.figure
        return Verdict(target, reached, reached >= target.bound if at_least else reached <= target.bound)

    def _reached(self, target: Target) -> float | None:
        ours = self.results.get(QEDFS)
        if ours is None or not ours.outcomes:
            return None
        if target.figure:
            return ours.figures().get(target.figure)
        if not target.against:
            return ours.median
        other = self.results.get(target.against)
        return ours.median / other.median if other is not None and other.outcomes and other.median else None
