"""The wrapper that makes a source reliable: it connects on first use, retries until a deadline, and pins the version.

Owns retries, back-off and the comparison of versions; `circuit_breaker.py` owns how long readers wait. Must not know
who reads. One `RetryingSource` stands for one backing, however many overlays use it.
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
from qedfs.source.base import Extent, Gathers, HasFile, Identity, KnowsZeros, Sameness, Source
from qedfs.source.circuit_breaker import CircuitBreaker, ReaderSlots, Silence
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.samples import Samples
from qedfs.source.url import Location

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE_SECONDS = 30.0  # for one read with all its retries; the disk timeout of a Linux guest is 30 s
PATIENCE = 10.0  # a background read may take this many deadlines: enough for 4 MiB at 14 KiB/s
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
UNBOUNDED = 1 << 20  # requests in flight if no kernel limits them: more than there ever are

Opener = Callable[[], Awaitable[Source]]


class RetryingSource:
    """A `Source` that connects lazily. `opener` connects and validates the first answer."""

    def __init__(
        self,
        location: Location,
        opener: Opener,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        pinning: Pinning = USUAL,
        samples: Samples | None = None,
        slots: ReaderSlots | None = None,
    ) -> None:
        """`samples`: filled by the sources that `opener` opens. `slots`: shared by the readers of all sources."""
        self.location = location
        self.pinning = pinning
        self.samples = Samples() if samples is None else samples
        # What the source has reported of its version so far. Replaced when it reports more, or other values that still
        # stand for the same version.
        self.identity: Identity | None = None
        self._error: QedfsError | None = None
        # Failed attempts that a retry may remedy, by reason. Includes the one that the deadline ended.
        self.retries = dict.fromkeys(Reason, 0)
        self._opener = opener
        self.deadline_seconds = deadline_seconds
        self._source: Source | None = None
        self._knows_zeros: KnowsZeros | None = None  # `_source`, if it knows zeros
        self._gathers: Gathers | None = None  # `_source`, or what it reads the encoded file from, if that gathers
        self._gather_seconds = 0.0
        self._closed = False
        self._opening = trio.Lock()
        self._breaker = CircuitBreaker(deadline_seconds, lambda: self.received, slots or ReaderSlots(UNBOUNDED))

    @property
    def is_dead(self) -> bool:
        """Whether the source let a whole deadline pass without a sign of life, and has not answered since."""
        return self._breaker.dead is not None

    def silence(self) -> Silence:
        """See `CircuitBreaker.silence`."""
        return self._breaker.silence()

    @property
    def error(self) -> QedfsError | None:
        """Why the last attempt failed. None after a success, and after `aclose`: nobody needs the source any more."""
        return None if self._closed else self._error

    @property
    def is_away(self) -> bool:
        """Whether requests have waited for AWAY_SECONDS without a sign of life, as of the last call of `silence`.

        Not after `aclose`.
        """
        return self._breaker.is_away and not self._closed

    @property
    def connected(self) -> Source | None:
        """The source that answers now; None before the first connection and after the last."""
        return self._source

    @property
    def received(self) -> int:
        """Bytes received over the current connection. Starts at 0 again with the next one."""
        return self._source.received if self._source else 0

    async def connect(self) -> Identity:
        """Connect unless connected, and return the version that the source serves.

        Raises:
            SourceUnreachable: no connection within the deadline.
            SourceChanged: another version than at the first connection.
            SourceError, Refused: a retry will not help.
        """
        source = await self._retried(self._connected)
        return self.identity or source.identity

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False, patient: bool = False) -> int:
        """Fill `buffer`; the range must lie inside the source. Raises what `connect` raises.

        Returns how many bytes the successful attempt has transferred.

        `patient`: no reader waits for this read. It gets PATIENCE deadlines, because many such reads may share a slow
        link. (The sources themselves detect a connection that has stalled.)
        """

        async def read() -> int:
            source = await self._connected()
            transferred = await source.read(pos, buffer, urgent=urgent)
            self._learn(source.identity)
            return len(buffer) if transferred is None else transferred

        return await self._retried(read, patience=PATIENCE if patient else 1.0)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts read as zeros, or None if the source cannot tell. Raises what `connect` raises."""

        async def extents() -> Sequence[Extent] | None:
            source = await self._connected()
            return await source.extents(pos, size)

        return await self._retried(extents)

    def zeros_now(self, pos: int, size: int) -> bool:
        """Whether the source already knows, without a request, that the range reads as zeros."""
        return self._knows_zeros is not None and self._knows_zeros.zeros_now(pos, size)

    def gather(self, seconds: float) -> None:
        """See `Gathers.gather`. Ignored while readers wait, and for a source that cannot."""
        if self._breaker.readers:
            seconds = 0.0
        if seconds != self._gather_seconds:
            self._gather_seconds = seconds
            if self._gathers is not None:
                self._gathers.gather(seconds)

    async def difference(self, samples: Samples) -> str | None:
        """How the bytes that the source serves now differ from `samples`, or None. Raises what `connect` raises."""

        async def difference() -> str | None:
            source = await self._connected()
            file = source.file if isinstance(source, HasFile) else source
            read = functools.partial(file.read, urgent=True)
            return await samples.difference(read, file.identity.size)

        return await self._retried(difference)

    def reader(self) -> AbstractAsyncContextManager[None]:
        """Limit everything that a reader waits for to the deadline, and to less while the source is dead.

        Raises:
            SourceUnreachable: the time is up.
        """
        return self._breaker.reader(self._no_answer)

    async def aclose(self) -> None:
        """Drop all connections for good. Any later call raises SourceUnreachable at once."""
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
                file = source.file if isinstance(source, HasFile) else source
                self._gathers = file if isinstance(file, Gathers) else None
                if self._gathers is not None:
                    self._gathers.gather(self._gather_seconds)
            return self._source

    def _learn(self, told: Identity) -> None:
        """Store what an answer reported about the version. Details that an answer adds count from then on.

        Within a connection, the source itself ensures that the version stays the same. Raises SourceChanged if a new
        connection reports another version.
        """
        if told is self.identity:
            return
        verdict = (self.identity or told).compare(told)
        if verdict.sameness is Sameness.CHANGED:
            raise SourceChanged(f"backing {self.location} is another version: {verdict.why}")
        self.identity = told

    async def _opened(self) -> Source:
        """A new connection. All requests wait for it, so it gets one deadline, even if a patient read asked for it."""
        source = None
        if not self._closed:
            with trio.move_on_after(self.deadline_seconds):
                source = await self._opener()
        if self._closed:
            if source is not None:  # `aclose` could not close it, because it was not open yet
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
        """Retry until success, the deadline, or an error that a retry cannot remedy.

        No attempt starts after the deadline. `patience`: how many deadlines a single attempt may take.
        """
        last, signs = self._no_answer(), self._breaker.signs_of_life
        give_up = trio.current_time() + self.deadline_seconds
        trying = True  # False during the pause between two attempts
        with self._breaker.wait(patience * self.deadline_seconds) as scope:
            pause = FIRST_PAUSE_SECONDS
            while True:
                try:
                    result = await action()
                except SourceUnreachable as exc:
                    if self._closed:
                        raise
                    trying = False
                    last, self._error = exc, exc.fresh()
                    self.retries[exc.reason] += 1
                    # Half of the pause is random, so that the clients of one server do not retry in lockstep.
                    wait = max(pause * random.uniform(0.5, 1), exc.retry_after_seconds or 0)  # noqa: S311
                    await trio.sleep(min(wait, max(0.0, give_up - trio.current_time())))
                    if trio.current_time() >= give_up:
                        await self._breaker.end(scope)
                        break
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                    trying = True
                except QedfsError as exc:
                    self._error = exc.fresh()
                    self._answered()
                    raise
                else:
                    self._error = None
                    self._answered()
                    return result
        if trying:
            self.retries[Reason.TIMEOUT] += 1
        self._error = last.fresh()
        if self._breaker.exhausted(signs, last):
            log.info("%s; until it answers, its readers get this error after a moment", last)
        raise last

    def _answered(self) -> None:
        if self._breaker.answered():
            log.info("backing %s answers again", self.location)
