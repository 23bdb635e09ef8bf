"""A background job of an image: what all kinds have in common. A kind says what its work is (`stream.py`).

Owns the task's loop, pause and resume, the limit, the hold-off, and what becomes of an error. The states and their
transitions are in `state.py`. Must not know any kind of job, nor who drives one: commands call the methods, and a
`Driver` hears of the states and decides what is not for the job to decide.

How to add a kind: derive from `Job`, give it a name (`kind`) and the hooks `done`, `progress`, `total`, `work` and
`finish`, and name the class in `kinds.py`.
"""

from __future__ import annotations

import abc
import enum
import logging
from collections.abc import Callable
from typing import ClassVar

import trio

from qedfs.errors import NoSpace, QedfsError, SourceChanged, SourceUnreachable
from qedfs.image.image import NO_SPACE_RETRY_SECONDS, Image
from qedfs.jobs.idle import LOOK_SECONDS
from qedfs.jobs.rate_limiter import RateLimiter
from qedfs.jobs.state import AT_WORK, Event, JobState, Order, Pause, State

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 30.0)  # first and longest pause before work that has failed is tried again

HoldOff = Callable[[], str]


class Action(enum.Enum):
    """What the job does about a failure."""

    RETRY = enum.auto()  # after a while, by itself
    HOLD = enum.auto()  # when the user resumes
    STOP = enum.auto()  # when the user starts it again
    IGNORE = enum.auto()  # go on after it, and stop at the end


def usual_action(error: QedfsError) -> Action:
    """What helps: a source that is away may come back, a full disk may become emptier, the rest stays as it is."""
    if isinstance(error, SourceChanged):
        return Action.STOP
    return Action.RETRY if isinstance(error, (SourceUnreachable, NoSpace)) else Action.STOP


class Driver:
    """Who answers for a job. This one lets it run by itself; derive from it to hear of it and to decide."""

    def changed(self, job: Job) -> None:
        """The job's state or the reason for it has changed."""

    def judge(self, job: Job, error: QedfsError) -> Action:
        """The error policy: what to do about a failure of the work."""
        return usual_action(error)

    async def may_finish(self, job: Job) -> bool:
        """Nothing is left to do. Returns whether to finish; False: somebody has cancelled or paused the job."""
        return True


def never() -> str:
    """The hold-off of a job that need not care for others."""
    return ""


class Job(abc.ABC):
    """One job of one image. `run` is its task; the commands are called from other tasks."""

    kind: ClassVar[str]  # QMP's `type` of the job, and what messages call it

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
        """A job that runs as soon as its task does if `enabled`; else `start` lets it run.

        `limit`: bytes per second, 0 for none. `hold_off`: asked before every request; says why the job should wait, ""
        if it may go on. `paused`: by the user, in an earlier mount.
        """
        self.image = image
        self.reason = ""  # for the state, for people
        self.rate_limiter = RateLimiter(limit)
        self.error: QedfsError | None = None  # what it has stopped for
        self.hold_off = hold_off
        self.cursor = 0  # where the work goes on; a failure that is not ignored sets it back to the start
        self.ignored: QedfsError | None = None  # the last failure that the work has gone on after
        self._ignored_at = 0  # the cursor then
        self._hindrance: tuple[Event, str] | None = None  # the failure that it tries again after, until it gets on
        self._held_for = ""  # the error that it waits with for the user
        self._driver = driver or Driver()
        self._machine = JobState(state, Order.ON if enabled else Order.OFF, Pause.USER if paused else Pause.NONE)
        self._poked = trio.Event()

    # What a kind of job is.

    @property
    @abc.abstractmethod
    def done(self) -> bool:
        """Whether nothing is left to do, whoever did it."""

    @property
    @abc.abstractmethod
    def progress(self) -> int:
        """Bytes, of `total`, that are done."""

    @property
    @abc.abstractmethod
    def total(self) -> int:
        """Bytes that are done in the end."""

    @abc.abstractmethod
    async def work(self) -> bool:
        """Work on from the cursor. Returns True when nothing is left but to finish.

        Returns False when it has broken off because the job is not `allowed` to go on or should hold off, and when it
        has come to the end without having done everything. Raises QedfsError for the policy to judge.
        """

    @abc.abstractmethod
    async def finish(self) -> None:
        """Draw the conclusion, after which the job is `done`. Raises QedfsError for the policy to judge."""

    def stand_still(self) -> None:  # noqa: B027 - most kinds have nothing to do here
        """The job does not work for the time being."""

    async def look_again(self) -> None:  # noqa: B027 - as above
        """Called every LOOK_SECONDS while the job stands because of an error. Must not raise QedfsError."""

    async def remember_pause(self, *, paused: bool) -> None:  # noqa: B027 - as above
        """Let the next mount find the job paused, or not, if a pause of this kind outlives the mount."""

    # How it stands.

    @property
    def state(self) -> State:
        """What it is doing."""
        return self._machine.state

    @property
    def enabled(self) -> bool:
        """Whether it runs, or would if it were not held or paused."""
        return self._machine.order is Order.ON

    @property
    def active(self) -> bool:
        """Whether it is at work, or will be by itself or when somebody resumes it."""
        return self.state in AT_WORK or (self.enabled and self.state is not State.COMPLETE)

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`."""
        return self._machine.pause is not Pause.NONE

    @property
    def allowed(self) -> bool:
        """Whether it may go on, as far as commands and errors are concerned."""
        return self._machine.allowed

    @property
    def hindered(self) -> bool:
        """Whether it tries again after a failure and has not got on yet."""
        return self._hindrance is not None

    def attach(self, driver: Driver) -> None:
        """Let `driver` answer for the job from now on."""
        self._driver = driver

    # Commands.

    def start(self, limit: int | None = None) -> None:
        """Let it run, also after it has been cancelled or has failed."""
        if limit is not None:
            self.rate_limiter.limit = limit
        self.error = self.ignored = self._hindrance = None
        self._ignored_at = 0
        self._command(Event.START)

    def cancel(self) -> None:
        """Stop it until `start`. What has been done stays."""
        self._command(Event.CANCEL)

    async def pause(self) -> None:
        """Hold it until `resume`."""
        self._command(Event.PAUSE)
        await self.remember_pause(paused=True)

    async def resume(self) -> None:
        """Go on, also after a failure that holds it."""
        self._hindrance = None
        self._command(Event.RESUME)
        await self.remember_pause(paused=False)

    def set_limit(self, limit: int) -> None:
        """Bytes per second from now on, 0 for no limit."""
        self.rate_limiter.limit = limit
        self.poke()

    def fail(self, error: QedfsError) -> None:
        """Stop for this reason; `start` tries again."""
        log.error("%s: the %s has stopped: %s", self.image.name, self.kind, error)
        self.error = error.fresh()
        self.stand_still()
        self._report(Event.LOSE_SOURCE if isinstance(error, SourceChanged) else Event.FAIL, str(error))

    # The task.

    async def run(self, *, once: bool = False) -> None:
        """Work until the job is done; waits where it must.

        `once`: also ends when the job has been cancelled or has failed, since nobody will start it again.
        """
        pause = RETRY_SECONDS[0]
        while not self.done:
            try:
                if not await self._gate(once=once):
                    break
                # Another try is no news: who looks at the state wants to know what it waits for.
                self._report(*(self._hindrance or (Event.RUN, "")))
                await self._conclude(nothing_left=await self.work())
                pause = RETRY_SECONDS[0]
            except QedfsError as exc:
                await self._heed(exc, pause)
                pause = min(2 * pause, RETRY_SECONDS[1])
            except Exception:
                # A fault of ours costs this job only, and whoever waits for it must hear of it.
                log.exception("%s: internal error", self.image.name)
                self.fail(QedfsError("internal error, see the log"))
        if self.done:
            self._report(Event.COMPLETE)

    async def _gate(self, *, once: bool) -> bool:
        """Return True when the job may work; False if its task has nothing to wait for.

        The work may be done without the job, by readers and guests; and with `once` a job that is off has ended.
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
            self.gets_on()
            if await self._driver.may_finish(self):
                await self.finish()
        elif self.ignored is not None and self.allowed and not self.hold_off():
            # The work did not break off: all that is left is what was ignored.
            self.fail(self.ignored)

    async def _heed(self, error: QedfsError, pause: float) -> None:
        """Do about a failure what the policy says; `pause`: seconds until the next try."""
        action = self._driver.judge(self, error)
        # Without progress since the last failure there is nothing to go on after.
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
        if pause == RETRY_SECONDS[0]:  # the next tries would say nothing new
            log.info("%s: the %s waits: %s", self.image.name, self.kind, error)
        full = isinstance(error, NoSpace)
        self._hindrance = (Event.HALT if full else Event.WAIT, str(error))
        self._report(*self._hindrance)
        await self.sleep(NO_SPACE_RETRY_SECONDS if full else pause)

    # For the kinds.

    def gets_on(self) -> None:
        """The work has got on: whatever hindered it is over."""
        self._hindrance = None
        self._report(Event.RUN)

    def poke(self) -> None:
        """End the sleep of the job's task: something has changed."""
        poked, self._poked = self._poked, trio.Event()
        poked.set()

    async def sleep(self, seconds: float | None) -> None:
        """Sleep until a command comes or the time is over; None: until a command comes."""
        poked = self._poked
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            await poked.wait()

    # Inside.

    def _command(self, event: Event) -> None:
        self._machine.process(event)
        self.poke()

    def _report(self, event: Event, reason: str = "") -> None:
        """Show what the task has come to, and tell the driver if that is news."""
        before = self.state
        if self._machine.process(event) and (self.state, reason) != (before, self.reason):
            self.reason = reason
            self._driver.changed(self)

    def _why_held(self) -> str:
        if self._machine.pause is Pause.USER:
            return "by the user"
        return self._held_for if self._machine.pause is Pause.ERROR else ""
