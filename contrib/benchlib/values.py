"""The words of the bench, as plain values: an outcome, a unit, a target, a row. No I/O."""

from __future__ import annotations

import dataclasses
import enum
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lab import Lab

MIB = 1 << 20
GIB = 1 << 30

QEDFS = "qedfs"
QEMU = "qemu"
LIMIT = "limit"


class Skip(Exception):
    """A contender cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run of one contender.

    `value` is in the row's unit. `figures` are by-products in units of their own, which their names tell
    ("CPU s/GiB"). `scaled` says that less than the row's whole work was done and the value was scaled up to it.
    """

    value: float
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scaled: bool = False


class Unit(enum.Enum):
    """What a row counts; `higher_is_better` decides which way a ratio is taken."""

    MB_PER_SECOND = ("MB/s", True)  # 10^6 bytes
    IOPS = ("IOPS", True)
    MILLISECONDS = ("ms", False)
    SECONDS = ("s", False)
    COUNT = ("", False)

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

    With `against`, `bound` is a ratio to that contender: at least that many times as fast where higher is better, at
    most that many times as long where lower is better. Without it, `bound` is a value in the row's unit.
    """

    bound: float
    against: str | None = None

    def ratio(self, ours: float, theirs: float | None) -> float | None:
        """What the bound is compared with; None if the other contender did not run."""
        if self.against is None:
            return ours
        return ours / theirs if theirs else None

    def met(self, unit: Unit, ratio: float) -> bool:
        """Whether `ratio` is on the right side of the bound."""
        return ratio >= self.bound if unit.higher_is_better else ratio <= self.bound


Contender = Callable[[], Outcome]
Contenders = Mapping[str, Contender]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `prepare` sets up what all contenders of the row share and gives them by name."""

    name: str
    title: str
    unit: Unit
    prepare: Callable[[Lab], AbstractContextManager[Contenders]]
    target: Target | None = None
    note: str = ""
    # Fewer where one run is long or does not wobble; None: as many as the command line says.
    runs: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs of one contender in one row."""

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

    def ratio(self) -> float | None:
        """qedfs compared as the row's target says; None if it cannot be told."""
        ours = self.results.get(QEDFS)
        if self.row.target is None or ours is None or not ours.outcomes:
            return None
        other = self.results.get(self.row.target.against or "")
        return self.row.target.ratio(ours.median, other.median if other and other.outcomes else None)

    def met(self) -> bool | None:
        """Whether the target is reached; None if the row has none or it cannot be told."""
        ratio = self.ratio()
        if ratio is None or self.row.target is None:
            return None
        return self.row.target.met(self.row.unit, ratio)
