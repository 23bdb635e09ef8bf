"""How much the overlay layer does, counted in looks at the file and at its tables: the same on a machine that is busy.

Must not look at a clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.holes import Holes
from qedfs.overlay.storage import FileStorage

# What every walk calls again and again: reads and lseeks of the file, and the two steps over a table or a gap.
_STEPS = (
    *((FileStorage, name) for name in ("read", "read_now", "extent")),
    *((ClusterMap, "gap"), (Holes, "at")),
)


class TooMuchWork(AssertionError):
    """A block takes more steps than it may. Raised at the first one too many: what would go on for hours ends here."""


class Work:
    """The steps taken so far."""

    def __init__(self, most: int) -> None:
        self.steps = 0
        self._most = most

    def count(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step`, counted; a coroutine function counts when it is called."""

        def counted(*args: Any) -> Any:
            self.steps += 1
            if self.steps > self._most:
                raise TooMuchWork(f"more than {self._most} steps")
            return step(*args)

        return counted


@contextlib.contextmanager
def at_most(steps: int) -> Iterator[Work]:
    """Count the steps of the block, whichever overlay takes them.

    Raises:
        TooMuchWork: there are more.
    """
    work = Work(steps)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _STEPS:
            patch.setattr(owner, name, work.count(getattr(owner, name)))
        yield work
