"""How long a source's readers may wait: the whole deadline, or a moment only where waiting has shown to be in vain.

Owns the signs of life of one source, and the cancel scopes of those who wait for it. Must not know who they are, nor
how the source is asked.

The kernel has a bounded number of requests in flight for a whole mount, and who waits here holds one of them. So:

- A source that has given no sign of life while somebody has waited for it for a whole deadline is *dead*. All who wait
  get their error within a hold (some seconds, spread, since to answer takes time as well), and who comes later, too.
- Nobody needs to know that it is back: of those who come, one in PROBE_SECONDS asks it. Its request goes on when it has
  got its error. The first sign of life lets all go on.
- So many may wait for one source of a mount (`ReaderSlots`). A reader that finds no slot waits for one; if the source
  gives no sign of life for a hold, it gets an error, since it would keep others from their places in the kernel for
  nothing. A source that is slow and alive costs nobody a byte before the deadline.

A sign of life is an answer, or a part of one. An error is none.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator

import trio

from qedfs.errors import QedfsError, SourceUnreachable

PROBE_SECONDS = 1.0  # from one reader that asks a dead source to the next one
# That a reader of a dead source waits for its error, and at the most so many deadlines: a source that is just coming
# back may need some of it. It is more where many wait, up to MOST_HOLD_SECONDS, for about so many errors a second and
# no more: readers that come again at once, as many do, must not take the processor. But who has waited for a deadline
# already waits for HOLD_DEADLINES more at the most, however many there are.
HOLD_SECONDS = 3.0
HOLD_DEADLINES = 1 / 3
MOST_HOLD_SECONDS = 4.0
ERRORS_PER_SECOND = 250
CROWD = 16  # so many may be answered at once
GRACE_SECONDS = 1.0  # more than the deadline: the error of the step, if there is one, says better what has happened
LEAST_PLACES = 64


class ReaderSlots:
    """How many may wait for the sources of one mount: half of what the kernel lets be in flight, in equal shares."""

    def __init__(self, in_flight: int) -> None:
        self._places = in_flight // 2
        self.sources = 0  # that have readers

    @property
    def share(self) -> int:
        """Readers that may wait for one source. A single one gets half: there must be room for the next."""
        return max(LEAST_PLACES, self._places // max(2, self.sources))


class CircuitBreaker:
    """The readers of one source. `received` tells its bytes, parts of answers included."""

    def __init__(self, deadline_seconds: float, received: Callable[[], int], places: ReaderSlots) -> None:
        self.dead: QedfsError | None = None  # why, from its death to its next sign of life
        self._deadline_seconds = deadline_seconds
        self._received = received
        self._places = places
        self._inside = 0  # readers that have a place
        self._room = trio.lowlevel.ParkingLot()
        self._answers = 0
        self._back = trio.Event()
        self._next_probe = 0.0
        # Readers, and the requests that were sent for them, and when each has waited for long enough.
        self._waits: dict[trio.CancelScope, float] = {}

    @property
    def signs(self) -> tuple[int, int]:
        """Signs of life so far; whoever sees the same ones twice has seen none in between."""
        return self._answers, self._received()

    def answered(self) -> bool:
        """The source has given an answer; returns whether it was dead before."""
        self._answers += 1
        if self.dead is None:
            return False
        self.dead = None
        for scope, whole in self._waits.items():
            scope.deadline = max(scope.deadline, whole)
        self._back.set()
        self._back = trio.Event()
        return True

    def exhausted(self, signs: tuple[int, int], error: QedfsError) -> bool:
        """Somebody has waited for a whole deadline, and saw `signs` before; returns whether that shows it is dead."""
        if self.dead is not None or self.signs != signs:
            return False
        self.dead = error.fresh()
        now, hold = trio.current_time(), self._spread_seconds()
        for scope in self._waits:
            # Also if that is later: those who came together would all be answered at once, while others wait for that.
            scope.deadline = now + hold * random.random()  # noqa: S311 - no secret
        return True

    async def end(self, scope: trio.CancelScope) -> None:
        """Return at once unless many wait for a dead source; then wait for the end of `scope`, which is soon."""
        if self.dead is not None and len(self._waits) > CROWD:
            soon = trio.current_time() + self._spread_seconds() * random.random()  # noqa: S311 - no secret
            scope.deadline = min(scope.deadline, soon)
            self._waits.pop(scope, None)  # it has its error, whatever comes now
            await trio.sleep_forever()

    @contextlib.contextmanager
    def wait(self, seconds: float) -> Iterator[trio.CancelScope]:
        """Around a wait for the source that has so much time, and less if the source dies."""
        with trio.move_on_after(seconds) as scope:
            self._waits[scope] = scope.deadline
            try:
                yield scope
            finally:
                self._waits.pop(scope, None)

    @contextlib.asynccontextmanager
    async def reader(self, no_answer: Callable[[], QedfsError]) -> AsyncIterator[None]:
        """Around all that a reader waits for. Raises `no_answer()`, or what the source has died of, at the end."""
        with self.wait(self._deadline_seconds + GRACE_SECONDS) as scope:
            if self.dead is not None:
                await self._ask_or_wait(scope)
            if self._inside >= self._places.share:
                await self._find_place(no_answer)
            self._places.sources += not self._inside
            self._inside += 1
            try:
                yield
            except SourceUnreachable:
                await self.end(scope)  # of many who have waited for one and the same request
                raise
            finally:
                self._inside -= 1
                self._places.sources -= not self._inside
                self._room.unpark()
        if scope.cancelled_caught:
            raise no_answer() if self.dead is None else self.dead.fresh()

    async def _ask_or_wait(self, scope: trio.CancelScope) -> None:
        """Return if the source is back, or is to be asked again; else wait until the scope is over."""
        now = trio.current_time()
        scope.deadline = min(scope.deadline, now + self._hold_seconds() * random.uniform(0.5, 1))  # noqa: S311 - no secret
        if now >= self._next_probe:
            self._next_probe = now + PROBE_SECONDS
            return
        await self._back.wait()

    async def _find_place(self, no_answer: Callable[[], QedfsError]) -> None:
        while self._inside >= self._places.share:
            signs = self.signs
            with trio.move_on_after(self._hold_seconds() * random.uniform(0.5, 1)):  # noqa: S311 - no secret
                await self._room.park()
                continue
            if signs == self.signs:
                raise no_answer()

    def _hold_seconds(self) -> float:
        least = min(HOLD_SECONDS, HOLD_DEADLINES * self._deadline_seconds)
        most = min(MOST_HOLD_SECONDS, self._deadline_seconds)
        return max(least, min(most, len(self._waits) / ERRORS_PER_SECOND))

    def _spread_seconds(self) -> float:
        """The time over which those who have waited for a deadline get their errors."""
        return min(self._hold_seconds(), HOLD_DEADLINES * self._deadline_seconds)
