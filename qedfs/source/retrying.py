"""A source that may be away: opened on first need, asked again within a deadline, held to the version it first showed.

Owns retry, back-off and the comparison of versions; how long readers wait is in `circuit_breaker.py`. Must not know who
asks.
One `RetryingSource` stands for one backing however many overlays use it.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import trio

from qedfs.errors import QedfsError, Reason, SourceChanged, SourceUnreachable
from qedfs.source.base import Extent, Identity, KnowsZeros, Sameness, Source
from qedfs.source.circuit_breaker import CircuitBreaker, ReaderSlots
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.samples import Samples
from qedfs.source.url import Location

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE_SECONDS = 30.0  # of one read with all its retries; a guest's own disk timeout is 30 s on Linux
PATIENCE = 10.0  # deadlines that one background read may take: 4 MiB at 14 KiB/s
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
ALONE = 1 << 20  # more than ever come, where there is no kernel that counts

Opener = Callable[[], Awaitable[Source]]


class RetryingSource:
    """The port `Source` with a lazy connection. `opener` connects and judges the first answer."""

    def __init__(
        self,
        location: Location,
        opener: Opener,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        pinning: Pinning = USUAL,
        samples: Samples | None = None,
        places: ReaderSlots | None = None,
    ) -> None:
        """`samples`: which the sources of `opener` fill, too. `places`: for the readers of all sources together."""
        self.location = location
        self.pinning = pinning
        self.samples = Samples() if samples is None else samples
        # What the samples are of, if that is not the source itself; set by `opener`.
        self.file: Source | None = None
        # What has been told so far. Another object when more has been told, or something else that is the same version.
        self.identity: Identity | None = None
        self.error: QedfsError | None = None  # why the last try failed; None after a success
        # Tries that failed in a way that may pass, by what stood in the way; the last one of a deadline too.
        self.retries = dict.fromkeys(Reason, 0)
        self._opener = opener
        self.deadline_seconds = deadline_seconds
        self._source: Source | None = None
        self._knows_zeros: KnowsZeros | None = None  # the source, if it does
        self._closed = False
        self._opening = trio.Lock()
        self._breaker = CircuitBreaker(deadline_seconds, lambda: self.received, places or ReaderSlots(ALONE))

    @property
    def parallel(self) -> int:
        """How many background reads may usefully be in flight at once at the most."""
        return self._source.parallel if self._source else 16

    @property
    def is_dead(self) -> bool:
        """Whether it has been waited for in vain, and has not answered since."""
        return self._breaker.dead is not None

    @property
    def received(self) -> int:
        """Bytes that have come over the present connection; starts again with the next one."""
        return self._source.received if self._source else 0

    async def connect(self) -> Identity:
        """Have a connection and return the version that is served.

        Raises:
            SourceUnreachable: not within the deadline.
            SourceChanged: another version than at the first connection.
            SourceError, Refused: asking again will not help.
        """
        source = await self._retried(self._connected)
        return self.identity or source.identity

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False, patient: bool = False) -> None:
        """Fill `buffer`; the range must lie inside the source. Errors as for `connect`.

        `patient`: nobody waits, and on a slow link many such reads share it, so one that goes on gets more time. (A
        connection on which nothing comes is noticed by the sources themselves.)
        """

        async def read() -> None:
            source = await self._connected()
            await source.read(pos, buffer, urgent=urgent)
            self._learn(source.identity)

        await self._retried(read, patience=PATIENCE if patient else 1.0)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts read as zeros, or None if the source cannot tell. Errors as for `connect`."""

        async def extents() -> Sequence[Extent] | None:
            source = await self._connected()
            return await source.extents(pos, size)

        return await self._retried(extents)

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the source knows, without asking anybody, that the range reads as zeros."""
        return self._knows_zeros is not None and self._knows_zeros.zeros_now(pos, size)

    async def difference(self, samples: Samples) -> str | None:
        """Say how the bytes that are served now differ from samples, or None. Errors as for `connect`."""

        async def difference() -> str | None:
            source = await self._connected()
            file = self.file or source
            read = functools.partial(file.read, urgent=True)
            return await samples.difference(read, file.identity.size)

        return await self._retried(difference)

    def reader(self) -> AbstractAsyncContextManager[None]:
        """Around all that a reader waits for: it ends with the deadline, and sooner where waiting is in vain.

        Raises:
            SourceUnreachable: one of these.
        """
        return self._breaker.reader(self._no_answer)

    async def aclose(self) -> None:
        """Drop all connections, for good: who still asks gets SourceUnreachable at once."""
        self._closed = True
        if self._source is not None:
            source, self._source = self._source, None
            await source.aclose()

    async def _connected(self) -> Source:
        if self._source is not None:
            return self._source
        async with self._opening:
            if self._source is None:
                source = await self._opened()
                try:
                    self._learn(source.identity)
                except SourceChanged:
                    await source.aclose()
                    raise
                self._source = source
                self._knows_zeros = source if isinstance(source, KnowsZeros) else None
            return self._source

    def _learn(self, told: Identity) -> None:
        """Take over what is told of the version. The source has seen to it that it is still the same one.

        Raises SourceChanged where another connection shows another one. What is told late counts from then on.
        """
        if told is self.identity:
            return
        verdict = (self.identity or told).compare(told)
        if verdict.sameness is Sameness.CHANGED:
            raise SourceChanged(f"backing {self.location} is another version: {verdict.why}")
        self.identity = told

    async def _opened(self) -> Source:
        """A new connection. Everybody queues for it, so it must not take as long as the most patient read may."""
        source = None
        if not self._closed:
            with trio.move_on_after(self.deadline_seconds):
                source = await self._opener()
        if self._closed:
            if source is not None:  # `aclose` did not know of it
                await source.aclose()
            raise SourceUnreachable(f"backing {self.location}: closed")
        if source is None:
            raise self._no_answer()
        return source

    def _no_answer(self) -> SourceUnreachable:
        return SourceUnreachable(
            f"backing {self.location} gave no answer within {self.deadline_seconds:g} s", reason=Reason.TIMEOUT
        )

    async def _retried(self, action: Callable[[], Awaitable[T]], *, patience: float = 1.0) -> T:
        """Try until it works, the deadline is over, or an error says that trying again is of no use.

        `patience`: how many times the deadline a single try may take.
        """
        last, signs = self._no_answer(), self._breaker.signs
        give_up = trio.current_time() + self.deadline_seconds
        trying = True  # and not between two tries
        with self._breaker.wait(patience * self.deadline_seconds) as scope:
            pause = FIRST_PAUSE_SECONDS
            while True:
                try:
                    result = await action()
                except SourceUnreachable as exc:
                    if self._closed:
                        raise
                    trying = False
                    last, self.error = exc, exc.fresh()
                    self.retries[exc.reason] += 1
                    # Half of the pause is random, so that many clients of one server do not return in step.
                    wait = max(pause * random.uniform(0.5, 1), exc.retry_after_seconds or 0)  # noqa: S311
                    await trio.sleep(min(wait, max(0.0, give_up - trio.current_time())))
                    if trio.current_time() >= give_up:
                        await self._breaker.end(scope)
                        break
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                    trying = True
                except QedfsError as exc:
                    self.error = exc.fresh()
                    self._answered()
                    raise
                else:
                    self.error = None
                    self._answered()
                    return result
        if trying:
            self.retries[Reason.TIMEOUT] += 1
        self.error = last.fresh()
        if self._breaker.exhausted(signs, last):
            log.info("%s; until it answers, its readers get this error after a moment", last)
        raise last

    def _answered(self) -> None:
        if self._breaker.answered():
            log.info("backing %s answers again", self.location)
