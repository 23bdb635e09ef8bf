"""The circuit breaker of one source: how long its readers may wait, which is only a moment once the source is dead.

Owns the source's signs of life and the cancel scopes of its waiting readers. Must not know who the readers are, nor how
a request is sent.

The kernel bounds the requests in flight for a whole mount, and each waiting reader holds one of them. Therefore:

- A source is *dead* when a reader has waited for a whole deadline and the source has given no sign of life meanwhile.
  All waiting readers then get their error within the hold, a few seconds. The errors are spread over it, because they
  take processor time. Later readers get their error within a hold, too.
- Recovery needs no polling. Every PROBE_SECONDS one of the arriving readers sends a request to the dead source; that
  request continues after its reader has got the error. On the first sign of life all waiting readers continue.
- The number of readers that may wait for one source is bounded (`ReaderSlots`). A reader without a slot waits for one.
  If the source gives no sign of life during a hold, that reader gets an error, because it only keeps the request slots
  of the kernel from others. Readers of a source that is slow but alive lose nothing before their deadline.

A sign of life is an answer, or a part of one. An error is not. A source is *away* from the moment on when requests have
waited for AWAY_SECONDS without a sign of life, until the next one. That is for people and managers: it ends no wait.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

import trio

from qedfs.errors import QedfsError, SourceUnreachable

PROBE_SECONDS = 1.0  # between two readers that probe a dead source
# The hold: how long a reader of a dead source waits for its error. It is HOLD_SECONDS, or HOLD_DEADLINES of a deadline
# if that is less; a source that is just coming back may answer in that time. With many readers it grows, up to
# MOST_HOLD_SECONDS, so that no more than about ERRORS_PER_SECOND get their error in a second. Many readers retry at
# once, and would otherwise take the processor. A reader that has already waited for a whole deadline waits for no more
# than HOLD_DEADLINES of another one, however many readers there are.
HOLD_SECONDS = 3.0
HOLD_DEADLINES = 1 / 3
MOST_HOLD_SECONDS = 4.0
ERRORS_PER_SECOND = 250
CROWD = 16  # up to this many waiting readers get their errors at once
GRACE_SECONDS = 1.0  # on top of a reader's deadline: the error of the step that failed is the more precise one
LEAST_SLOTS = 64
AWAY_SECONDS = 2.0  # long links answer within one second


class ReaderSlots:
    """How many readers may wait for the sources of one mount: half of the kernel's limit, in equal shares."""

    def __init__(self, in_flight: int) -> None:
        self._slots = in_flight // 2
        self.sources = 0  # sources that have readers

    @property
    def share(self) -> int:
        """How many readers may wait for one source. A lone source gets half of the slots: a second needs some."""
        return max(LEAST_SLOTS, self._slots // max(2, self.sources))


class Silence(NamedTuple):
    """How long a source has left its requests unanswered."""

    seconds: float  # close to 0 if nobody waits
    since: float  # seconds since 1970


class CircuitBreaker:
    """The circuit breaker of one source. `received` returns its byte count, partial answers included."""

    def __init__(self, deadline_seconds: float, received: Callable[[], int], slots: ReaderSlots) -> None:
        self.dead: QedfsError | None = None  # why the source is dead; None while it is not
        self._deadline_seconds = deadline_seconds
        self._received = received
        self._slots = slots
        self._readers = 0  # readers that hold a slot
        self._freed = trio.lowlevel.ParkingLot()
        self._answers = 0
        self._revived = trio.Event()
        self._next_probe = 0.0
        self._seen = (0, 0)  # the signs of life at the last call of `silent_since`, and when they were new there
        self._heard_at, self._heard_on = trio.current_time(), time.time()
        self.is_away = False  # as of the last call of `silence`
        # The scopes of readers, and of the requests sent for them, each with its original deadline.
        self._waits: dict[trio.CancelScope, float] = {}

    @property
    def readers(self) -> int:
        """How many readers wait for the source."""
        return self._readers

    @property
    def signs_of_life(self) -> tuple[int, int]:
        """The count of signs of life. If two values are equal, there was none in between."""
        return self._answers, self._received()

    def silence(self) -> Silence:
        """For how long requests have been waiting without a sign of life. Call it about once a second.

        Sees only what has changed between two calls: nothing else is noted with each answer. Once the source is away,
        it stays so while nobody asks it: a stream that retries pauses in between.
        """
        answers, received = self.signs_of_life
        # A new connection counts its bytes from 0, which is no sign of life.
        heard = answers != self._seen[0] or received > self._seen[1]
        self._seen = answers, received
        if heard or (not self._waits and not self.is_away):
            self._heard_at, self._heard_on = trio.current_time(), time.time()
        silence = Silence(trio.current_time() - self._heard_at, self._heard_on)
        self.is_away = silence.seconds >= AWAY_SECONDS
        return silence

    def answered(self) -> bool:
        """Record an answer of the source. Returns whether it was dead before."""
        self._answers += 1
        if self.dead is None:
            return False
        self.dead = None
        for scope, whole in self._waits.items():
            scope.deadline = max(scope.deadline, whole)
        self._revived.set()
        self._revived = trio.Event()
        return True

    def exhausted(self, signs: tuple[int, int], error: QedfsError) -> bool:
        """Record that a wait took a whole deadline; `signs` is the count from its start.

        Returns whether the source is dead because of it. False if it was dead already.
        """
        if self.dead is not None or self.signs_of_life != signs:
            return False
        self.dead = error.fresh()
        now, hold = trio.current_time(), self._spread_seconds()
        for scope in self._waits:
            # Even if this prolongs a wait. Readers that arrived together would otherwise get their errors all at once,
            # and delay everybody else.
            scope.deadline = now + hold * random.random()  # noqa: S311 - no secret
        return True

    async def end(self, scope: trio.CancelScope) -> None:
        """Delay the error of one of many readers of a dead source: `scope` is cancelled soon. Otherwise return."""
        if self.dead is not None and len(self._waits) > CROWD:
            soon = trio.current_time() + self._spread_seconds() * random.random()  # noqa: S311 - no secret
            scope.deadline = min(scope.deadline, soon)
            self._waits.pop(scope, None)  # its error stands, so a sign of life must not prolong it
            await trio.sleep_forever()

    @contextlib.contextmanager
    def wait(self, seconds: float) -> Iterator[trio.CancelScope]:
        """Limit a wait for the source to `seconds`, and to less if the source dies."""
        with trio.move_on_after(seconds) as scope:
            self._waits[scope] = scope.deadline
            try:
                yield scope
            finally:
                self._waits.pop(scope, None)

    @contextlib.asynccontextmanager
    async def reader(self, no_answer: Callable[[], QedfsError]) -> AsyncIterator[None]:
        """Limit everything that a reader waits for. Raises `no_answer()` at the deadline, or why the source is dead."""
        with self.wait(self._deadline_seconds + GRACE_SECONDS) as scope:
            if self.dead is not None:
                await self._probe_or_wait(scope)
            if self._readers >= self._slots.share:
                await self._take_slot(no_answer)
            self._slots.sources += not self._readers
            self._readers += 1
            try:
                yield
            except SourceUnreachable:
                await self.end(scope)  # many readers may have waited for this one request
                raise
            finally:
                self._readers -= 1
                self._slots.sources -= not self._readers
                self._freed.unpark()
        if scope.cancelled_caught:
            raise no_answer() if self.dead is None else self.dead.fresh()

    async def _probe_or_wait(self, scope: trio.CancelScope) -> None:
        """Return when the source is back, or at once if this reader is to probe it. The scope bounds the wait."""
        now = trio.current_time()
        hold = self._hold_seconds() * random.uniform(0.5, 1)  # noqa: S311 - no secret
        scope.deadline = min(scope.deadline, now + hold)
        if now >= self._next_probe:
            self._next_probe = now + PROBE_SECONDS
            return
        await self._revived.wait()

    async def _take_slot(self, no_answer: Callable[[], QedfsError]) -> None:
        while self._readers >= self._slots.share:
            signs = self.signs_of_life
            with trio.move_on_after(self._hold_seconds() * random.uniform(0.5, 1)):  # noqa: S311 - no secret
                await self._freed.park()
                continue
            if signs == self.signs_of_life:
                raise no_answer()

    def _hold_seconds(self) -> float:
        least = min(HOLD_SECONDS, HOLD_DEADLINES * self._deadline_seconds)
        most = min(MOST_HOLD_SECONDS, self._deadline_seconds)
        return max(least, min(most, len(self._waits) / ERRORS_PER_SECOND))

    def _spread_seconds(self) -> float:
        """How long the errors of readers that have waited for a whole deadline are spread over."""
        return min(self._hold_seconds(), HOLD_DEADLINES * self._deadline_seconds)
