"""The states of a background job, and every way from one to another.

Owns the tables: whatever decides about states stands in this file. Must not know what a job does, who commands it and
who listens.

A job is three machines, which share their events (the idea is h11's, `_state.py`):

1. `Order`: whether the job has been told to run. A command changes it at once.
2. `Pause`: what holds the job although it has been told to run. Changes at once, too.
3. `State`: what the job is doing, as `status` shows it. The job's task changes it when it gets there: what is in flight
   lands first, so a job that is told to pause is `running` for a moment longer.

Two rules couple the machines and are no rows of a table:

- The job may go on (`allowed`) while its order is on and nothing pauses it.
- While the order is off, the task's reports HALT, WAIT and RUN change nothing. The task sends them before it notices
  that somebody has cancelled the job or that it has failed; what it failed with must stay to be seen.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar

M = TypeVar("M", bound=enum.Enum)


class Event(enum.StrEnum):
    """What happens to a job."""

    # Commands.
    START = "start"
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    # An error, by what was decided about it.
    HOLD = "hold"  # wait for the user to resume
    FAIL = "fail"  # stop until the user starts it again
    LOSE_SOURCE = "lose-source"  # likewise; the source has become another version
    # Reports of the job's task.
    REST = "rest"  # it stands, because it has not been told to run
    HALT = "halt"  # it stands until somebody resumes it, or makes room on the disk
    WAIT = "wait"  # it stands, and goes on by itself
    RUN = "run"
    COMPLETE = "complete"


class Order(enum.Enum):
    """Whether the job has been told to run."""

    OFF = "off"
    ON = "on"


class Pause(enum.Enum):
    """What holds the job until it is resumed."""

    NONE = "none"
    USER = "user"
    ERROR = "error"


class State(enum.StrEnum):
    """What the job is doing, as `status` shows it."""

    OFF = "off"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETE = "complete"
    FAILED = "failed"
    SOURCE_CHANGED = "source-changed"


AT_WORK = frozenset({State.WAITING, State.RUNNING, State.PAUSED})
ENDED = frozenset({State.COMPLETE, State.FAILED, State.SOURCE_CHANGED})

# A failure takes the order back: nothing is tried again before somebody starts the job.
_ORDERS = {Event.START: Order.ON, Event.CANCEL: Order.OFF, Event.FAIL: Order.OFF, Event.LOSE_SOURCE: Order.OFF}
ORDER_TRANSITIONS: Mapping[Order, Mapping[Event, Order]] = {
    Order.OFF: _ORDERS,
    Order.ON: _ORDERS,
}

_COMMANDS = {Event.START: Pause.NONE, Event.PAUSE: Pause.USER, Event.RESUME: Pause.NONE}
PAUSE_TRANSITIONS: Mapping[Pause, Mapping[Event, Pause]] = {
    Pause.NONE: {**_COMMANDS, Event.HOLD: Pause.ERROR},
    Pause.ERROR: {**_COMMANDS, Event.HOLD: Pause.ERROR},
    # The error is of a request that was in flight when the user paused the job: the user's pause came first.
    Pause.USER: {**_COMMANDS, Event.HOLD: Pause.USER},
}

_REPORTS = {Event.HALT: State.PAUSED, Event.WAIT: State.WAITING, Event.RUN: State.RUNNING}
# COMPLETE comes in every state: readers and guests may do the work of a job that is off or has failed.
_ENDS = {Event.FAIL: State.FAILED, Event.LOSE_SOURCE: State.SOURCE_CHANGED, Event.COMPLETE: State.COMPLETE}
STATE_TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.OFF: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    State.WAITING: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    State.RUNNING: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    State.PAUSED: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    # What a job stopped for says more than that it is off.
    State.FAILED: {Event.REST: State.FAILED, **_REPORTS, **_ENDS},
    State.SOURCE_CHANGED: {Event.REST: State.SOURCE_CHANGED, **_REPORTS, **_ENDS},
    # The work is done and does not begin again; the overlay may still turn out to be damaged.
    State.COMPLETE: _ENDS,
}
_STANDS_FOR = {Event.REST: State.OFF, **_REPORTS, **_ENDS}


class TransitionError(RuntimeError):
    """An event that cannot happen in this state: a fault of ours."""


class JobState:
    """The three machines of one job."""

    def __init__(self, state: State, order: Order, pause: Pause) -> None:
        self.state = state
        self.order = order
        self.pause = pause
        self.allowed = False  # kept up to date instead of computed: a job asks before every request
        self._couple()

    def process(self, event: Event) -> bool:
        """Move every machine that sees this event.

        Returns whether the state is now the one that the event stands for; False where another one is more telling.

        Raises:
            TransitionError: one of them cannot take it in its state; none has moved.
        """
        order = _next(ORDER_TRANSITIONS, self.order, event)
        pause = _next(PAUSE_TRANSITIONS, self.pause, event)
        state = _next(STATE_TRANSITIONS, self.state, event)
        if event in _REPORTS and order is Order.OFF:
            state = self.state
        self.order, self.pause, self.state = order, pause, state
        self._couple()
        return state is _STANDS_FOR.get(event)

    def _couple(self) -> None:
        self.allowed = self.order is Order.ON and self.pause is Pause.NONE


def _next(table: Mapping[M, Mapping[Event, M]], now: M, event: Event) -> M:
    """Where the event leads, or `now` if no row of this table knows it."""
    if event in table[now]:
        return table[now][event]
    if any(event in row for row in table.values()):
        raise TransitionError(f"a job in state '{now.value}' cannot take the event '{event}'")
    return now
