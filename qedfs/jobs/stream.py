"""The background job of one image: brings in what is missing, then lets the overlay forget its backing.

Owns the order, the pace, the states and what the user has said (pause, limit). Must not know who drives it: commands
call the methods, and whoever wants to see changes registers a listener.

The job walks the map from the start. A run of missing clusters becomes background requests as the fetch queue gives it
turns; holes of the source are dealt with on the way (`missing.py`). When a walk has found nothing more to do and all
flights have landed, the image is complete.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import NoSpace, QedfsError, SourceChanged, SourceUnreachable
from qedfs.image.condition import Cause
from qedfs.image.image import NO_SPACE_RETRY_SECONDS, Image
from qedfs.jobs.idle import LOOK_SECONDS
from qedfs.jobs.missing import MissingRuns
from qedfs.jobs.rate_limiter import RateLimiter

log = logging.getLogger(__name__)

PACE_SECONDS = 0.25
RETRY_SECONDS = (1.0, 30.0)  # first and longest pause after the source has failed
# Keep every fetched byte from being kept, until the overlay is opened again.
_LOSSES = (Cause.BARRIER_FAILED, Cause.SOURCE_CHANGED)
# May be over with the next try.
_FAILURES = (Cause.NO_SPACE, Cause.NOT_BEGUN, Cause.COMMIT_FAILED, Cause.NOT_KEPT, Cause.FETCH_FAILED)


class State(enum.StrEnum):
    """What the job is doing, as `status` shows it."""

    OFF = "off"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETE = "complete"
    FAILED = "failed"
    SOURCE_CHANGED = "source-changed"


class Action(enum.Enum):
    """What the job does about a failure."""

    RETRY = enum.auto()  # after a while, by itself
    HOLD = enum.auto()  # when the user resumes
    STOP = enum.auto()  # when the user starts it again
    IGNORE = enum.auto()  # go on behind it, and stop at the end


def usual_action(error: QedfsError) -> Action:
    """What helps: a source that is away may come back, a full disk may become emptier, the rest stays as it is."""
    if isinstance(error, SourceChanged):
        return Action.STOP
    return Action.RETRY if isinstance(error, (SourceUnreachable, NoSpace)) else Action.STOP


class StreamJob:
    """The stream of one image. `run` is its task; the other methods are called from other tasks."""

    def __init__(self, image: Image, *, enabled: bool = True, limit: int = 0) -> None:
        """`limit`: bytes per second, 0 for none."""
        self.image = image
        self.state = State.COMPLETE if image.complete else State.OFF
        self.reason = ""  # why it is not running, for people
        self.rate_limiter = RateLimiter(limit)
        self.error: QedfsError | None = None  # what it has stopped for
        self.listeners: list[Callable[[StreamJob], None]] = []
        self.judge: Callable[[QedfsError], Action] = usual_action
        # Asked before every request: why the stream should wait, "" if it may go on.
        self.hold_off: Callable[[], str] = lambda: ""
        # Asked when nothing is missing any more; False: do not detach, somebody has cancelled or paused.
        self.may_detach: Callable[[], Awaitable[bool]] | None = None
        self._enabled = enabled and image.overlay.writable
        self._paused = image.overlay.record.paused
        self._held: QedfsError | None = None
        self._cursor = 0  # the cluster at which the walk goes on
        self._ignored: QedfsError | None = None
        self._ignored_at = 0  # the cursor then
        self._looked_at = -1  # bytes that had been kept and written when a stream that failed was last looked at
        self._known_failures = 0  # of the image, that have been dealt with
        self._hindered: tuple[State, str] | None = None  # what it is still in for, until bytes are brought in again
        self._trying = False  # after a failure: go carefully
        self._passed_over = False  # the last walk has left clusters to writes that are under way
        self._poked = trio.Event()
        self._missing = MissingRuns(image)

    # What it has done.

    @property
    def total(self) -> int:
        """Bytes of the image."""
        return self.image.size

    @property
    def populated(self) -> int:
        """Bytes that need the source no longer."""
        return min(self.image.size, self.image.populated + self._missing.skipped)

    @property
    def enabled(self) -> bool:
        """Whether it streams, or would if it were not held or paused."""
        return self._enabled

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`."""
        return self._paused or self._held is not None

    async def next_missing(self, pos: int) -> int | None:
        """The first byte at or behind `pos` that needs the source; None: there is none."""
        return await self._missing.first_from(pos)

    # Commands.

    def start(self, limit: int | None = None) -> None:
        """Let it run, also after it has been cancelled or has failed."""
        if limit is not None:
            self.rate_limiter.limit = limit
        self._enabled = True
        self._paused = False
        self._held = self._ignored = self.error = self._hindered = None
        self.image.condition.clear(Cause.JOB_STOPPED)
        self._ignored_at = 0
        self._poke()

    def cancel(self) -> None:
        """Stop it until `start`. What has been brought in stays."""
        self._enabled = False
        self._poke()

    async def pause(self) -> None:
        """Hold it; remembered in the overlay, so that the next mount finds it paused."""
        await self._set_paused(paused=True)

    async def resume(self) -> None:
        """Go on, also after a failure that holds it."""
        self._held = self._hindered = None
        await self._set_paused(paused=False)

    def set_limit(self, limit: int) -> None:
        """Bytes per second from now on, 0 for no limit."""
        self.rate_limiter.limit = limit
        self._poke()

    async def step(self, pos: int) -> tuple[int, int, int | None]:
        """Populate the next missing run at or after `pos` with one request.

        Returns (pos, size, next): what was populated and where the next missing cluster is, None if there is none. A
        size of 0 says that nothing was missing. Errors of the source and of the overlay.
        """
        image, fetch = self.image, self.image.fetch
        cluster_size = image.overlay.cluster_size
        if image.complete or fetch is None:
            return pos, 0, None
        source_size = await image.source_size()
        run = await self._missing.next_run(pos // cluster_size, source_size)
        if run is None:
            return pos, 0, None
        first, count = run
        start = first * cluster_size
        size = min(count * cluster_size, image.size - start)
        async with fetch.waiting():
            flights = await fetch.bring(first, count, consumer=image)
        await fetch.adopted(flights, consumer=image)
        self._raise(*_LOSSES, Cause.NO_SPACE)
        if image.overlay.all_missing(first, count) and not image.overlay.pending(first, count):
            self._raise(*_FAILURES)
            raise QedfsError(f"{image.name}: what was fetched could not be kept")
        following = await self._missing.next_run(first + count, source_size)
        if following is None and await self._missing.next_run(0, source_size) is None:
            # Whoever owns the pace has come to the end: nothing needs the backing any more.
            await image.detach()
            self._poke()
        return start, size, None if following is None else following[0] * cluster_size

    # The task.

    async def run(self) -> None:
        """Stream until the image is complete; waits where it must. Ends when the image is complete."""
        pause = RETRY_SECONDS[0]
        while not self.image.complete:
            try:
                if not await self._gate():
                    break
                # Another try is no news: who looks at the state wants to know what it waits for.
                self._change(*(self._hindered or (State.RUNNING, "")))
                self._known_failures = self.image.failures
                await self._stream()
                pause = RETRY_SECONDS[0]
            except QedfsError as exc:
                await self._heed(exc, pause)
                pause = min(2 * pause, RETRY_SECONDS[1])
            except Exception:
                # A fault of ours costs this stream only, and whoever waits for it must hear of it.
                log.exception("%s: internal error", self.image.name)
                self._stop(State.FAILED, QedfsError("internal error, see the log"))
        self._change(State.COMPLETE)

    async def _heed(self, error: QedfsError, pause: float) -> None:
        """Do about a failure what the judge says; `pause`: seconds until the next try."""
        action = self.judge(error)
        # Without progress since the last one there is nothing to go on behind.
        if action is Action.IGNORE and self._cursor > self._ignored_at:
            self._ignored, self._ignored_at = error.fresh(), self._cursor
            self._known_failures = self.image.failures
            self.image.try_again()
            return
        self._cursor = 0
        if action is Action.RETRY and pause == RETRY_SECONDS[0]:  # the next tries would say nothing new
            log.info("%s: the stream waits: %s", self.image.name, error)
        if action is Action.HOLD:
            self._held = error.fresh()
        elif action is not Action.RETRY:
            self._stop(State.SOURCE_CHANGED if isinstance(error, SourceChanged) else State.FAILED, error)
        else:
            full = isinstance(error, NoSpace)
            self._hindered = (State.PAUSED if full else State.WAITING, str(error))
            self._change(*self._hindered)
            await self._sleep(NO_SPACE_RETRY_SECONDS if full else pause)

    async def _stream(self) -> None:
        """Walk until there is nothing left, then detach. Returns early when it was told to stop."""
        image, fetch = self.image, self.image.fetch
        if fetch is None:
            return
        source_size = await image.source_size()
        image.streaming = True
        if image not in fetch.consumers:
            fetch.consumers.append(image)
        self._trying = self._hindered is not None or image.full is not None
        image.try_again()
        kept, pause = image.counters.kept, PACE_SECONDS
        while await self._walk(source_size) and self._ignored is None:
            await fetch.landed(image)
            self._raise_failure()
            # What came and was not kept, for whatever reason, is not asked for again without a rest.
            lost = kept == image.counters.kept and not self._passed_over
            if lost or self._passed_over:
                await self._sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS[1]) if lost else PACE_SECONDS
            kept = image.counters.kept
            if not self._allowed or self.hold_off():
                return
        await fetch.landed(image)
        self._raise_failure()
        if await self._missing.next_run(0, source_size) is not None:
            if self._ignored is not None and self._allowed:
                self._stop(State.FAILED, self._ignored)
            return
        self._go_on()
        if self.may_detach is None or await self.may_detach():
            await image.detach()
            log.info("%s: complete, the backing is no longer needed", image.name)

    async def _walk(self, source_size: int) -> bool:
        """Walk over the map from the cursor to the end; returns whether there may be more to do behind it."""
        image, fetch = self.image, self.image.fetch
        assert fetch is not None  # noqa: S101 - for the type checker; `_stream` has looked
        cluster_size = image.overlay.cluster_size
        asked = self._passed_over = False
        while self._allowed and (run := await self._missing.next_run(self._cursor, source_size)) is not None:
            if self.hold_off():
                return asked
            first, count = run[0], self._ours(run[0], self._paced(run[1]))
            if not count:
                self._passed_over, self._cursor = True, first + 1
                continue
            if due := self.rate_limiter.due():
                # In short sleeps, which a command ends: it may be a pause or another limit.
                await self._sleep(min(due, PACE_SECONDS))
                continue
            await fetch.turn(first, count, consumer=image)
            self._raise_failure()
            if not self._allowed or self.hold_off():
                return asked
            if not image.overlay.all_missing(first, count) or self._ours(first, count) < count:
                continue  # a reader, a guest or another image's stream has brought a part of it in, or is about to
            fetch.start(first, count, consumer=image)
            self.rate_limiter.sent(count * cluster_size)
            self._cursor, asked = first + count, True
            if self._trying:
                # One request shows whether the source is back, or the room; a window of them would be in vain.
                await fetch.landed(image)
                self._raise_failure()
                self._go_on()
        self._cursor = 0
        return asked or self._passed_over

    def _go_on(self) -> None:
        """What hindered it is over."""
        self._trying, self._hindered = False, None
        self._change(State.RUNNING)

    def _paced(self, count: int) -> int:
        """How many of so many clusters one request may bring at this limit."""
        return int(max(1, min(count, self.rate_limiter.piece_bytes // self.image.overlay.cluster_size)))

    def _ours(self, first: int, count: int) -> int:
        """How many missing clusters from `first` on are for us to bring in.

        One that a guest's write has claimed is not: what we fetched would not be kept, and be fetched again until the
        write has ended. What is in flight may be claimed, and costs nothing.
        """
        overlay, fetch = self.image.overlay, self.image.fetch
        assert fetch is not None  # noqa: S101 - for the type checker; `_stream` has looked
        pending = (cluster for cluster in overlay.pending(first, count) if not fetch.in_flight(cluster))
        return next(pending, first + count) - first

    # States.

    @property
    def _allowed(self) -> bool:
        return self._enabled and not self._paused and self._held is None

    async def _gate(self) -> bool:
        """Return True when the job may run; False if the image has become complete without it.

        That may be by `step`, or because readers and guests have brought in what a stream that failed could not.
        """
        while not self.image.complete:
            if not self._allowed:
                self.image.streaming = False
                self._change(State.PAUSED if self._enabled else State.OFF, self._why_not())
                await self._sleep(None if self.error is None else LOOK_SECONDS)
                if self.error is not None:
                    await self._detach_if_local()
            elif reason := self.hold_off():
                self.image.streaming = False
                self._change(State.WAITING, reason)
                await self._sleep(LOOK_SECONDS)
            else:
                return True
        return False

    async def _detach_if_local(self) -> None:
        """Let the image be complete if nothing of it is missing any more."""
        image, fetch = self.image, self.image.fetch
        brought = image.counters.kept + image.counters.written
        if brought == self._looked_at or fetch is None or image.version is None:
            return
        self._looked_at = brought
        source_size = image.version.size
        try:
            pos = await self._missing.first_from(0)
            if pos is None or (source_size is not None and pos >= source_size):
                await fetch.landed(image)
                await image.detach()
                log.info("%s: complete all the same, by what readers have brought in", image.name)
        except QedfsError as exc:
            log.debug("%s: still failed: %s", image.name, exc)

    def _why_not(self) -> str:
        if self._paused:
            return "by the user"
        return "" if self._held is None else str(self._held)

    def _raise_failure(self) -> None:
        self._raise(*_LOSSES)
        if self.image.failures != self._known_failures:
            self._raise(*_FAILURES)

    def _raise(self, *causes: Cause) -> None:
        error = self.image.condition.first(*causes)
        if error is not None:
            raise error.fresh()

    def fail(self, error: QedfsError) -> None:
        """Do not run, for this reason; `start` tries all the same."""
        self._stop(State.FAILED, error)

    def _stop(self, state: State, error: QedfsError) -> None:
        """End for now; `start` tries again."""
        log.error("%s: the stream has stopped: %s", self.image.name, error)
        self._enabled = False
        self.error = error.fresh()
        self.image.condition.note(Cause.JOB_STOPPED, error)
        self.image.streaming = False
        self._change(state, str(error))

    def _change(self, state: State, reason: str = "") -> None:
        if state is State.OFF and self.state in (State.FAILED, State.SOURCE_CHANGED):
            return  # what it stopped for is more telling than that it is off
        if (state, reason) == (self.state, self.reason):
            return
        self.state, self.reason = state, reason
        for listener in self.listeners:
            listener(self)

    async def _set_paused(self, *, paused: bool) -> None:
        self._paused = paused
        self._poke()
        overlay = self.image.overlay
        if overlay.writable and overlay.record.paused != paused:
            await overlay.change_record(lambda record: dataclasses.replace(record, paused=paused))

    def _poke(self) -> None:
        poked, self._poked = self._poked, trio.Event()
        poked.set()

    async def _sleep(self, seconds: float | None) -> None:
        """Until a command comes or the time is over."""
        poked = self._poked
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            await poked.wait()
