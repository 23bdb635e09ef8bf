"""What every kind of background job has from its base: seen at one that only counts, a step a second."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from qedfs.errors import BadOverlay, NoSpace, QedfsError, SourceChanged, SourceError, SourceUnreachable
from qedfs.image.consumer import NO_SPACE_RETRY_SECONDS
from qedfs.jobs.job import AGAIN_SECONDS, RETRY_SECONDS, Action, usual_action
from qedfs.jobs.state import ENDED, State
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

from .support import STEP_BYTES, STEP_SECONDS, CountJob, Told

STEPS = CountJob.steps
SECONDS = STEPS * STEP_SECONDS
SUCCESS = [State.RUNNING, State.COMPLETE]


@contextlib.asynccontextmanager
async def counting(
    told: Told, *, limit: int = 0, enabled: bool = True, failures: dict[int, Exception] | None = None
) -> AsyncIterator[CountJob]:
    """A job whose task runs."""
    async with served(FakeSource(b"x" * CLUSTER)) as image, trio.open_nursery() as nursery:
        job = CountJob(image, limit=limit, enabled=enabled, driver=told)
        job.failures = failures or {}
        nursery.start_soon(job.run)
        yield job
        nursery.cancel_scope.cancel()


async def finished(job: CountJob) -> None:
    """Wait until the job has come to its end, whatever it is."""
    with trio.fail_after(1000):
        while job.state not in ENDED:  # noqa: ASYNC110
            await trio.sleep(0.1)


def state_of(job: CountJob) -> State:
    """A call: mypy takes a property that it saw compared for unchanged, also over an `await`."""
    return job.state


def is_active(job: CountJob) -> bool:
    """As above."""
    return job.active


async def test_it_works_to_the_end(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    async with counting(told) as job:
        assert (job.state, job.progress, job.total) == (State.OFF, 0, STEPS * STEP_BYTES)
        await trio.sleep(3.5)
        assert (state_of(job), job.progress) == (State.RUNNING, 3 * STEP_BYTES)
        await finished(job)
        assert (job.progress, job.error, job.reason) == (job.total, None, "")
        assert told.states == SUCCESS


async def test_it_waits_to_be_started(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    async with counting(told, enabled=False) as job:
        await trio.sleep(SECONDS)
        assert (job.state, job.enabled, job.tried, told.changes) == (State.OFF, False, [], [])
        job.start()
        assert job.enabled
        await finished(job)
        assert told.states == SUCCESS


async def test_a_pause_lets_the_step_under_way_end(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    async with counting(told) as job:
        await trio.sleep(2.5)
        await job.pause()
        assert (job.state, job.paused, job.allowed, job.enabled) == (State.RUNNING, True, False, True)
        await trio.sleep(100)
        assert (state_of(job), job.reason, job.progress) == (State.PAUSED, "by the user", 3 * STEP_BYTES)
        await job.resume()
        await finished(job)
        assert told.states == [State.RUNNING, State.PAUSED, *SUCCESS]
        assert job.counted == list(range(STEPS))


async def test_a_cancelled_job_goes_on_from_where_it_was(
    autojump_clock: trio.testing.MockClock,
) -> None:
    told = Told()
    async with counting(told) as job:
        await trio.sleep(2.5)
        job.cancel()
        await trio.sleep(100)
        assert (job.state, job.enabled, job.progress) == (State.OFF, False, 3 * STEP_BYTES)
        job.start()
        await finished(job)
        assert told.states == [State.RUNNING, State.OFF, *SUCCESS]
        assert len(job.tried) == STEPS


async def test_a_cancel_while_paused_says_who_paused_it(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    async with counting(told) as job:
        await job.pause()
        await trio.sleep(1)
        job.cancel()
        await trio.sleep(1)
        assert (job.state, job.reason, job.paused) == (State.OFF, "by the user", True)
        await job.resume()
        await trio.sleep(1)
        assert (job.state, job.reason, job.paused) == (State.OFF, "", False)


async def test_a_limit_paces_it_and_its_end_is_felt_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with counting(Told(), limit=STEP_BYTES // 5) as job:
        await trio.sleep(16)
        # A step every five seconds.
        assert [round(at - job.tried[0][0]) for at, _ in job.tried] == [0, 5, 10, 15]
        job.set_limit(0)
        before = trio.current_time()
        await finished(job)
        assert trio.current_time() - before < SECONDS


async def test_it_holds_off_with_the_reason(autojump_clock: trio.testing.MockClock) -> None:
    told, reason = Told(), "the machine's disk is busy"
    async with served(FakeSource(b"x" * CLUSTER)) as image, trio.open_nursery() as nursery:
        job = CountJob(image, hold_off=lambda: reason, driver=told)
        nursery.start_soon(job.run)
        await trio.sleep(100)
        assert (job.state, job.reason, job.tried) == (State.WAITING, reason, [])
        reason = ""
        await trio.sleep(2)
        assert state_of(job) is State.RUNNING
        reason = "a guest is reading or writing"
        await trio.sleep(100)
        assert (state_of(job), job.reason) == (State.WAITING, reason)
        assert 0 < job.progress < job.total
        reason = ""
        await finished(job)
        assert told.states == [State.WAITING, State.RUNNING, State.WAITING, *SUCCESS]


# Errors.


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (SourceUnreachable("refused"), Action.RETRY),
        (NoSpace("full"), Action.RETRY),
        (SourceError("404"), Action.STOP),
        (SourceChanged("another version"), Action.STOP),
        (BadOverlay("damaged"), Action.STOP),
    ],
)
def test_the_usual_policy(error: QedfsError, action: Action) -> None:
    assert usual_action(error) is action


async def test_it_tries_again_by_itself_ever_more_rarely(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    async with counting(told, failures={2: SourceUnreachable("refused")}) as job:
        await trio.sleep(200)
        # The state names what it waits for all the time; the tries are no news.
        assert told.changes == [(State.RUNNING, ""), (State.WAITING, "refused")]
        times = [at for at, number in job.tried if number == 2]
        pauses = [round(later - earlier - STEP_SECONDS) for earlier, later in itertools.pairwise(times)]
        assert pauses[:6] == [1, 2, 4, 8, 16, 30]
        assert set(pauses[6:]) == {RETRY_SECONDS[1]}
        job.failures.clear()
        await finished(job)
        assert told.changes[2:] == [(State.RUNNING, ""), (State.COMPLETE, "")]


async def test_a_full_disk_pauses_it_until_there_is_room(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    async with counting(told, failures={0: NoSpace("full")}) as job:
        await trio.sleep(60)
        assert told.changes == [(State.RUNNING, ""), (State.PAUSED, "full")]
        assert not job.paused  # nobody need resume it
        first, second = (at for at, _ in job.tried[:2])
        assert second - first == pytest.approx(NO_SPACE_RETRY_SECONDS + STEP_SECONDS)
        job.failures.clear()
        await finished(job)
        assert told.states[2:] == SUCCESS


async def test_held_by_an_error_it_waits_for_the_user(autojump_clock: trio.testing.MockClock) -> None:
    told = Told(Action.HOLD)
    async with counting(told, failures={2: SourceUnreachable("refused")}) as job:
        await trio.sleep(100)
        assert (job.state, job.reason, job.paused, job.error) == (State.PAUSED, "refused", True, None)
        assert len(job.tried) == 3
        job.failures.clear()
        await job.resume()
        await finished(job)
        assert told.states == [State.RUNNING, State.PAUSED, *SUCCESS]


@pytest.mark.expect_log("the count has stopped: 404")
async def test_stopped_by_an_error_it_waits_for_a_start(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    async with counting(told, failures={2: SourceError("404")}) as job:
        await finished(job)
        assert (job.state, job.reason, str(job.error), job.enabled) == (State.FAILED, "404", "404", False)
        await job.resume()
        await trio.sleep(100)
        assert len(job.tried) == 3
        job.failures.clear()
        assert not job.active
        job.start()
        assert job.error is None
        assert is_active(job)  # though its state is still that of the failure
        await trio.sleep(SECONDS)
        assert told.states == [State.RUNNING, State.FAILED, *SUCCESS]


@pytest.mark.expect_log("the count has stopped")
async def test_another_version_of_the_source_has_a_state_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    async with counting(Told(), failures={0: SourceChanged("another version")}) as job:
        await finished(job)
        assert job.state is State.SOURCE_CHANGED


@pytest.mark.expect_log("the count has stopped: bad sector")
async def test_ignored_errors_are_what_it_ends_with(autojump_clock: trio.testing.MockClock) -> None:
    told = Told(Action.IGNORE)
    errors: dict[int, Exception] = {number: SourceError("bad sector") for number in (3, 5)}
    async with counting(told, failures=errors) as job:
        await finished(job)
        assert (told.judged, told.states) == (["bad sector"] * 2, [State.RUNNING, State.FAILED])
        assert job.counted == [number for number in range(STEPS) if number not in errors]


@pytest.mark.expect_log("the count has stopped: bad sector")
async def test_a_hold_off_after_an_ignored_error_is_not_the_end(autojump_clock: trio.testing.MockClock) -> None:
    told, reason = Told(Action.IGNORE), ""
    async with served(FakeSource(b"x" * CLUSTER)) as image, trio.open_nursery() as nursery:
        job = CountJob(image, hold_off=lambda: reason, driver=told)
        job.failures[3] = SourceError("bad sector")
        nursery.start_soon(job.run)
        await trio.sleep(5.5)
        reason = "a guest is reading or writing"
        await trio.sleep(100)
        assert (job.state, job.reason) == (State.WAITING, reason)
        reason = ""
        await finished(job)
        assert told.states == [State.RUNNING, State.WAITING, State.RUNNING, State.FAILED]
        assert job.progress == job.total - STEP_BYTES
        nursery.cancel_scope.cancel()


@pytest.mark.expect_log("internal error", "the count has stopped")
async def test_a_fault_of_ours_costs_this_job_only(autojump_clock: trio.testing.MockClock) -> None:
    async with counting(Told(), failures={0: KeyError("a fault")}) as job:
        await finished(job)
        assert (job.state, job.reason) == (State.FAILED, "internal error, see the log")


@pytest.mark.expect_log("the count has stopped: damaged")
@pytest.mark.parametrize("error", [SourceUnreachable("refused"), NoSpace("full"), None])
async def test_what_it_was_stopped_for_stays_to_be_seen(
    autojump_clock: trio.testing.MockClock, error: QedfsError | None
) -> None:
    """The step that was under way fails later, or ends well: that is no news about a job that has failed."""
    told = Told()
    async with counting(told, failures={} if error is None else {2: error}) as job:
        await trio.sleep(2.5)
        job.fail(BadOverlay("damaged"))
        assert job.state is State.FAILED
        await trio.sleep(100)
        assert (job.state, job.reason, str(job.error)) == (State.FAILED, "damaged", "damaged")
        assert told.states == [State.RUNNING, State.FAILED]


# The end.


async def test_the_driver_has_the_last_word(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    told.finish = False
    async with counting(told) as job:
        await trio.sleep(100)
        assert (job.state, job.progress, job.finished) == (State.OFF, job.total, False)
        told.finish = True
        job.start()
        await finished(job)
        assert told.states == [State.RUNNING, State.OFF, *SUCCESS]


async def test_another_driver_takes_over(autojump_clock: trio.testing.MockClock) -> None:
    first, second = Told(), Told()
    async with counting(first) as job:
        await trio.sleep(2)
        job.attach(second)
        await finished(job)
        assert (first.states, second.states) == ([State.RUNNING], [State.COMPLETE])


class StuckJob(CountJob):
    """Breaks off at once, without a reason and without an await."""

    begun = 0

    async def work(self) -> bool:
        self.begun += 1
        assert self.begun < 1000
        return False


async def test_work_that_cannot_begin_lets_other_tasks_run(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(b"x" * CLUSTER)) as image, trio.open_nursery() as nursery:
        job = StuckJob(image)
        nursery.start_soon(job.run)
        await trio.sleep(10)
        assert job.state is State.RUNNING
        assert 10 / AGAIN_SECONDS - 1 <= job.begun <= 10 / AGAIN_SECONDS + 1
        job.cancel()
        await trio.sleep(0.001)
        assert state_of(job) is State.OFF
        nursery.cancel_scope.cancel()
