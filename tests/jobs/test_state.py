"""The states of a background job: where each event leads from each state, and which events are refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

from qedfs.jobs.state import (
    ENDED,
    ORDER_TRANSITIONS,
    PAUSE_TRANSITIONS,
    STATE_TRANSITIONS,
    Event,
    JobState,
    Order,
    Pause,
    State,
    TransitionError,
)

TABLES: tuple[Mapping[Any, Mapping[Event, Enum]], ...] = (ORDER_TRANSITIONS, PAUSE_TRANSITIONS, STATE_TRANSITIONS)
# The task's reports; they say where it stands, so that none of them can come after the end.
REPORTS = {Event.REST, Event.HALT, Event.WAIT, Event.RUN}


def machines(job: JobState) -> tuple[State, Order, Pause]:
    return job.state, job.order, job.pause


def test_every_state_has_a_row_and_every_event_a_place() -> None:
    for table, states in zip(TABLES, (Order, Pause, State), strict=True):
        assert set(table) == set(states)
        for row in table.values():
            assert set(row.values()) <= set(states)
    seen = {event for table in TABLES for row in table.values() for event in row}
    assert seen == set(Event)


@pytest.mark.parametrize("event", Event)
def test_an_event_is_in_the_table_or_refused(event: Event) -> None:
    for state, order, pause in itertools.product(State, Order, Pause):
        job = JobState(state, order, pause)
        if state is State.COMPLETE and event in REPORTS:
            with pytest.raises(TransitionError, match=f"^a job in state 'complete' cannot take the event '{event}'$"):
                job.process(event)
            assert machines(job) == (state, order, pause)
            continue
        followed = job.process(event)
        late = order is Order.OFF and event in REPORTS - {Event.REST}
        assert machines(job) == (
            state if late else STATE_TRANSITIONS[state].get(event, state),
            ORDER_TRANSITIONS[order].get(event, order),
            PAUSE_TRANSITIONS[pause].get(event, pause),
        )
        assert job.allowed == (job.order is Order.ON and job.pause is Pause.NONE)
        assert followed == (job.state is STATE_TRANSITIONS[State.OFF].get(event))


def test_what_a_job_stopped_for_stays_to_be_seen() -> None:
    for end in (Event.FAIL, Event.LOSE_SOURCE):
        job = JobState(State.RUNNING, Order.ON, Pause.NONE)
        job.process(end)
        stopped = job.state
        assert stopped in ENDED
        # What was in flight fails as well, or succeeds, before the task notices.
        for report in REPORTS:
            assert not job.process(report)
            assert job.state is stopped
        job.process(Event.START)
        assert job.process(Event.RUN)
        assert job.state is State.RUNNING


def test_a_pause_of_the_user_outlasts_an_error_that_comes_later() -> None:
    job = JobState(State.RUNNING, Order.ON, Pause.NONE)
    for event in (Event.PAUSE, Event.HOLD):
        job.process(event)
    assert job.pause is Pause.USER
    job.process(Event.RESUME)
    assert job.allowed


def test_a_start_ends_every_pause() -> None:
    for pause in Pause:
        job = JobState(State.OFF, Order.OFF, pause)
        job.process(Event.START)
        assert job.allowed
