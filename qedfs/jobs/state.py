"""The states of a background job, and all transitions between them.

Owns the tables. Everything that decides about states is in this file. Must not know what a job does, who controls it
and who is notified.

A job has three state machines that share their events (an idea of h11, `_state.py`):

1. `Order`: whether the job was told to run. A command changes it at once.
2. `Pause`: what holds the job although it was told to run. Changes at once, too.
3. `State`: what the job is doing, as `status` shows it. The job's task changes it when it gets there. Requests in
   flight land first, so a job that is told to pause stays `running` for a moment.

Two rules couple the machines and are not in the tables:

- The job may continue (`allowed`) while its order is on and nothing pauses it.
- While the order is off, the task's reports HALT, WAIT and RUN change nothing. The task may send them before it notices
  that the job was cancelled or has failed, and they must not hide the failure.
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
    # An error, by how the policy judged it.
    HOLD = "hold"  # wait for the user to resume
    FAIL = "fail"  # stop until the user starts it again
    LOSE_SOURCE = "lose-source"  # likewise; the source has become another version
    # Reports of the job's task.
    REST = "rest"  # it does not work, because it was not told to run
    HALT = "halt"  # it does not work until a user resumes it, or frees space on the disk
    WAIT = "wait"  # it does not work, but will continue by itself
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

# A failure turns the order off: nothing is retried until a user starts the job.
_ORDERS = {Event.START: Order.ON, Event.CANCEL: Order.OFF, Event.FAIL: Order.OFF, Event.LOSE_SOURCE: Order.OFF}
ORDER_TRANSITIONS: Mapping[Order, Mapping[Event, Order]] = {
    Order.OFF: _ORDERS,
    Order.ON: _ORDERS,
}

_COMMANDS = {Event.START: Pause.NONE, Event.PAUSE: Pause.USER, Event.RESUME: Pause.NONE}
PAUSE_TRANSITIONS: Mapping[Pause, Mapping[Event, Pause]] = {
    Pause.NONE: {**_COMMANDS, Event.HOLD: Pause.ERROR},
    Pause.ERROR: {**_COMMANDS, Event.HOLD: Pause.ERROR},
    # The error is that of a request that was in flight when the user paused the job. The user's pause came first.
    Pause.USER: {**_COMMANDS, Event.HOLD: Pause.USER},
}

_REPORTS = {Event.HALT: State.PAUSED, Event.WAIT: State.WAITING, Event.RUN: State.RUNNING}
# COMPLETE is possible in every state, because readers and guests may do the work of a job that is off or has failed.
_ENDS = {Event.FAIL: State.FAILED, Event.LOSE_SOURCE: State.SOURCE_CHANGED, Event.COMPLETE: State.COMPLETE}
STATE_TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.OFF: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    State.WAITING: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    State.RUNNING: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    State.PAUSED: {Event.REST: State.OFF, **_REPORTS, **_ENDS},
    # The failure is more informative than the state off.
    State.FAILED: {Event.REST: State.FAILED, **_REPORTS, **_ENDS},
    State.SOURCE_CHANGED: {Event.REST: State.SOURCE_CHANGED, **_REPORTS, **_ENDS},
    # The work is done and does not start again, but the overlay may still turn out to be damaged.
    State.COMPLETE: _ENDS,
}
_STANDS_FOR = {Event.REST: State.OFF, **_REPORTS, **_ENDS}


class TransitionError(RuntimeError):
    """An event that is impossible in this state, which is a bug."""


class JobState:
    """The three machines of one job."""

    def __init__(self, state: State, order: Order, pause: Pause) -> None:
        self.state = state
        self.order = order
        self.pause = pause
        self.allowed = False  # stored instead of computed, because a job reads it before every request
        self._couple()

    def process(self, event: Event) -> bool:
        """Apply an event to every machine that knows it.

        Returns whether the state is now the one that the event stands for. False if another one takes precedence.

        Raises:
            TransitionError: the event is impossible in the state of a machine. None of them has changed.
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
    """The state after the event; `now` if no row of this table has the event."""
    if event in table[now]:
        return table[now][event]
    if any(event in row for row in table.values()):
        raise TransitionError(f"a job in state '{now.value}' cannot take the event '{event}'")
    return now
