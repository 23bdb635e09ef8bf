"""The base class of background jobs. Each kind of job, such as `stream.py`, defines the work.

Owns the loop of the job's task, pause and resume, the rate limit, the hold-off, and the handling of errors. The states
and their transitions are in `state.py`. Must not know any kind of job, nor who controls one: commands call the methods,
and a `Driver` is notified of changes and decides the policy.

How to add a kind: derive from `Job`, give it a name (`kind`) and the hooks `progress`, `work` and `finish`, and name
the class in `kinds.py`. If others may do its work, too, define `done`; if it does not walk the image, `total`.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import logging
from collections.abc import Callable, Iterator
from typing import ClassVar, TypedDict

import trio

from qedfs.errors import NoSpace, QedfsError, SourceChanged, SourceUnreachable
from qedfs.fetch.rate_limiter import RateLimiter
from qedfs.image.consumer import NO_SPACE_RETRY_SECONDS
from qedfs.image.image import Image
from qedfs.jobs.idle import LOOK_SECONDS
from qedfs.jobs.state import AT_WORK, Event, JobState, Order, Pause, State

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 30.0)  # first and longest pause before failed work is retried
AGAIN_SECONDS = 0.25  # before work that broke off without a reason continues, unless a command comes

HoldOff = Callable[[], str]


class Action(enum.Enum):
    """What the job does about a failure."""

    RETRY = enum.auto()  # retry by itself, after a while
    HOLD = enum.auto()  # pause until the user resumes the job
    STOP = enum.auto()  # stop until the user starts the job again
    IGNORE = enum.auto()  # continue after the failed part, and stop at the end


def usual_action(error: QedfsError) -> Action:
    """Retry if the source is unreachable or the disk is full, which may change. Stop for any other error."""
    if isinstance(error, SourceChanged):
        return Action.STOP
    return Action.RETRY if isinstance(error, (SourceUnreachable, NoSpace)) else Action.STOP


class Driver:
    """Receives the notifications of a job, and decides its policy. This base class lets the job run by itself."""

    def changed(self, job: Job) -> None:
        """Called when the job's state, or the reason for it, has changed."""

    def judge(self, job: Job, error: QedfsError) -> Action:
        """The error policy: what to do about a failure of the work."""
        return usual_action(error)

    async def may_finish(self, job: Job) -> bool:
        """Called when nothing is left to do. Returns whether to finish, False if the job was cancelled or paused."""
        return True


def never() -> str:
    """The hold-off of a job that never waits for others."""
    return ""


class JobOptions(TypedDict, total=False):
    """How a job of any kind begins, as `Job` explains it."""

    enabled: bool
    limit: int
    hold_off: HoldOff
    driver: Driver | None


class Job(abc.ABC):
    """One job of one image. `run` is its task; the commands are called from other tasks."""

    kind: ClassVar[str]  # QMP's `type` of the job, and what messages call it
    writes_source: ClassVar[bool] = False  # nothing else may use the source, or another one in its place, meanwhile

    def __init__(
        self,
        image: Image,
        *,
        enabled: bool = True,
        limit: int = 0,
        hold_off: HoldOff = never,
        driver: Driver | None = None,
        state: State = State.OFF,
        paused: bool = False,
    ) -> None:
        """`enabled`: the job works as soon as `run` is called. Otherwise it waits for `start`.

        `limit`: bytes per second, 0 for none. `hold_off`: called before every request; returns why the job should wait,
        or "". `paused`: the user paused the job in an earlier mount.
        """
        self.image = image
        self.reason = ""  # why it is in its state, for people
        self.rate_limiter = RateLimiter(limit)
        self.error: QedfsError | None = None  # why it has stopped
        self.hold_off = hold_off
        self.finished = False  # whether `finish` has ended well
        self.cursor = 0  # where the work continues; a failure that is not ignored resets it
        self.ignored: QedfsError | None = None  # the last failure that was ignored
        self._ignored_at = 0  # the cursor at that time
        self._hindrance: tuple[Event, str] | None = None  # the failure after which it retries, until it makes progress
        self._held_for = ""  # the error for which it waits for the user
        self._guest_bytes = -1  # what guests had read and written at the last look
        self._driver = driver or Driver()
        self._machine = JobState(state, Order.ON if enabled else Order.OFF, Pause.USER if paused else Pause.NONE)
        self._poked = trio.Event()
        self._wait: trio.CancelScope | None = None

    # Of most kinds of job.

    @property
    def done(self) -> bool:
        """Whether nothing is left to do, no matter who did it."""
        return self.finished

    @property
    def total(self) -> int:
        """The number of bytes when the job is done."""
        return self.image.size

    # To be implemented by each kind of job.

    @property
    @abc.abstractmethod
    def progress(self) -> int:
        """How many of the `total` bytes are done."""

    @property
    def moved(self) -> int:
        """The part of `progress` that the job has taken time for, plus a constant: what its rate is measured by."""
        return self.progress

    @abc.abstractmethod
    async def work(self) -> bool:
        """Continue the work from the cursor. Returns True when only `finish` is left to do.

        Returns False if it stopped because the job is not `allowed` to continue or should hold off, or if it has
        reached the end without having done everything. Raises a QedfsError, which the policy judges.
        """

    @abc.abstractmethod
    async def finish(self) -> None:
        """Complete the job, which is `done` after that. Raises a QedfsError, which the policy judges."""

    def stand_still(self) -> None:  # noqa: B027 - most kinds have nothing to do here
        """Called when the job stops working for the time being."""

    async def look_again(self) -> None:  # noqa: B027 - as above
        """Called every LOOK_SECONDS while the job is stopped by an error. Must not raise QedfsError."""

    async def remember_pause(self, *, paused: bool) -> None:  # noqa: B027 - as above
        """Store whether the job is paused, if a pause of this kind of job outlives the mount."""

    # State.

    @property
    def state(self) -> State:
        """What the job is doing."""
        return self._machine.state

    @property
    def enabled(self) -> bool:
        """Whether it was told to run, even if it is held or paused."""
        return self._machine.order is Order.ON

    @property
    def active(self) -> bool:
        """Whether it is working, or will be by itself or when it is resumed."""
        return self.state in AT_WORK or (self.enabled and self.state is not State.COMPLETE)

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`."""
        return self._machine.pause is not Pause.NONE

    @property
    def allowed(self) -> bool:
        """Whether it may continue, according to commands and errors."""
        return self._machine.allowed

    @property
    def hindered(self) -> bool:
        """Whether it retries after a failure, and has made no progress since."""
        return self._hindrance is not None

    def attach(self, driver: Driver) -> None:
        """Make `driver` the driver of the job."""
        self._driver = driver

    # Commands.

    def start(self, limit: int | None = None) -> None:
        """Make the job run, also after it was cancelled or has failed."""
        if limit is not None:
            self.rate_limiter.limit = limit
        self.error = self.ignored = self._hindrance = None
        self._ignored_at = 0
        self._command(Event.START)

    def cancel(self) -> None:
        """Stop the job until `start`. Keeps what has been done."""
        self._command(Event.CANCEL)

    async def pause(self) -> None:
        """Pause the job until `resume`."""
        self._command(Event.PAUSE)
        await self.remember_pause(paused=True)

    def hold(self) -> None:
        """Pause the job as the record says that the user has done. Nothing is stored."""
        self._command(Event.PAUSE)

    async def resume(self) -> None:
        """Continue after a pause, or after a failure that holds the job."""
        self._hindrance = None
        self._command(Event.RESUME)
        await self.remember_pause(paused=False)

    def set_limit(self, limit: int) -> None:
        """Set the limit in bytes per second, 0 for none."""
        self.rate_limiter.limit = limit
        self.poke()

    def fail(self, error: QedfsError) -> None:
        """Stop the job with this error until `start`."""
        log.error("%s: the %s has stopped: %s", self.image.name, self.kind, error)
        self.error = error.fresh()
        self.stand_still()
        self._report(Event.LOSE_SOURCE if isinstance(error, SourceChanged) else Event.FAIL, str(error))

    # The task.

    async def run(self, *, once: bool = False) -> None:
        """The job's task: works, or waits to, until the job is done.

        `once`: also end when the job was cancelled or has failed, because nobody will start it again.
        """
        pause = RETRY_SECONDS[0]
        while not self.done:
            try:
                if not await self._gate(once=once):
                    break
                poked = self._poked
                # A retry does not change the reported state: users want to know what the job waits for.
                self._report(*(self._hindrance or (Event.RUN, "")))
                await self._conclude(nothing_left=await self.work())
                pause = RETRY_SECONDS[0]
                # Without a wait, work that cannot even begin would keep every other task from running.
                if poked is self._poked and self.allowed and not self.done and not self.hold_off():
                    await self.sleep(AGAIN_SECONDS)
            except QedfsError as exc:
                await self._heed(exc, pause)
                pause = min(2 * pause, RETRY_SECONDS[1])
            except Exception:
                # A bug must end this job only, and be reported to those who wait for it.
                log.exception("%s: internal error", self.image.name)
                self.fail(QedfsError("internal error, see the log"))
        if self.done:
            self._report(Event.COMPLETE)

    async def _gate(self, *, once: bool) -> bool:
        """Wait until the job may work. Returns False if its task has nothing left to wait for.

        Readers and guests may have done the work meanwhile, and with `once` a job that is off has ended.
        """
        while not self.done:
            if not self.allowed:
                self.stand_still()
                self._report(Event.HALT if self.enabled else Event.REST, self._why_held())
                if once and not self.enabled:
                    return False
                await self.sleep(None if self.error is None else LOOK_SECONDS)
                if self.error is not None:
                    await self.look_again()
            elif reason := self.hold_off():
                self.stand_still()
                self._report(Event.WAIT, reason)
                await self.sleep(LOOK_SECONDS)
            else:
                return True
        return False

    async def _conclude(self, *, nothing_left: bool) -> None:
        if nothing_left:
            self.makes_progress()
            if await self._driver.may_finish(self):
                await self.finish()
                self.finished = True
        elif self.ignored is not None and self.allowed and not self.hold_off():
            # The work did not break off: all that is left is what was ignored.
            self.fail(self.ignored)

    async def _heed(self, error: QedfsError, pause: float) -> None:
        """Handle a failure according to the policy. `pause`: seconds until a retry."""
        action = self._driver.judge(self, error)
        # Ignore it only if there was progress since the last failure. Otherwise the work cannot get past it.
        if action is Action.IGNORE and self.cursor > self._ignored_at:
            self.ignored, self._ignored_at = error.fresh(), self.cursor
            return
        self.cursor = 0
        if action is Action.RETRY:
            await self._wait_to_retry(error, pause)
        elif action is Action.HOLD:
            self._held_for = str(error)
            self._machine.process(Event.HOLD)
        else:
            self.fail(error)

    async def _wait_to_retry(self, error: QedfsError, pause: float) -> None:
        if pause == RETRY_SECONDS[0]:  # log only the first failure of a series
            log.info("%s: the %s waits: %s", self.image.name, self.kind, error)
        full = isinstance(error, NoSpace)
        self._hindrance = (Event.HALT if full else Event.WAIT, str(error))
        self._report(*self._hindrance)
        await self.sleep(NO_SPACE_RETRY_SECONDS if full else pause)

    # For the kinds.

    def makes_progress(self) -> None:
        """Called by the work when it has made progress, which means that a failure is over."""
        self._hindrance = None
        self._report(Event.RUN)

    def guests_were_active(self) -> bool:
        """Whether a guest has read or written since the last call."""
        before, self._guest_bytes = self._guest_bytes, self.image.counters.read + self.image.counters.written
        return before != self._guest_bytes

    def poke(self) -> None:
        """Wake the job's task, because something has changed."""
        poked, self._poked = self._poked, trio.Event()
        poked.set()
        if self._wait is not None:
            self._wait.cancel()

    @contextlib.contextmanager
    def until_poked(self) -> Iterator[trio.CancelScope]:
        """A wait of the job's task that ends at the next command, which may forbid what it waits for."""
        with trio.CancelScope() as self._wait:
            try:
                yield self._wait
            finally:
                self._wait = None

    async def sleep(self, seconds: float | None) -> None:
        """Sleep until the next command, and at most `seconds` unless that is None."""
        poked = self._poked
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            await poked.wait()

    # Inside.

    def _command(self, event: Event) -> None:
        self._machine.process(event)
        self.poke()

    def _report(self, event: Event, reason: str = "") -> None:
        """Report what the task is doing. Notifies the driver of a change."""
        before = self.state
        if self._machine.process(event) and (self.state, reason) != (before, self.reason):
            self.reason = reason
            self._driver.changed(self)

    def _why_held(self) -> str:
        if self._machine.pause is Pause.USER:
            return "by the user"
        return self._held_for if self._machine.pause is Pause.ERROR else ""
