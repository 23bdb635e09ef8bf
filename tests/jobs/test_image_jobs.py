"""The jobs of one image: its stream and a kind of job that only these tests know, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from qedfs.errors import InUse, SourceError
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.job import Job
from qedfs.jobs.kinds import KINDS
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

from .support import CountJob

CONTENT = b"s" * (4 * CLUSTER)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, CountJob.kind, CountJob)


@contextlib.asynccontextmanager
async def running(*, stream: bool = False) -> AsyncIterator[ImageJobs]:
    """The jobs of an image, with their tasks. The stream runs only once it is started, unless `stream`."""
    async with served(FakeSource(CONTENT)) as image, trio.open_nursery() as nursery:
        jobs = ImageJobs(StreamJob(image, enabled=stream))
        nursery.start_soon(jobs.run)
        nursery.start_soon(jobs.stream.run)
        await trio.testing.wait_all_tasks_blocked()
        yield jobs
        nursery.cancel_scope.cancel()


def state_of(job: Job) -> State:
    """A call: mypy takes a property that it saw compared for unchanged, also over an `await`."""
    return job.state


def at_work(jobs: ImageJobs) -> Job | None:
    """As above."""
    return jobs.at_work


def test_every_kind_is_registered_under_its_name() -> None:
    assert KINDS["stream"] is StreamJob
    assert all(kind == job.kind for kind, job in KINDS.items())


async def test_a_job_that_is_begun_runs_to_its_end_and_is_gone(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as jobs:
        job = jobs.begin("count", limit=CountJob.steps * 1000)
        assert jobs.all() == [jobs.stream, job]
        assert at_work(jobs) is job
        await trio.sleep(100)
        assert (job.state, job.progress) == (State.COMPLETE, job.total)
        assert jobs.all() == [jobs.stream]
        assert at_work(jobs) is None
        # Another one of the same kind begins from the start.
        assert jobs.begin("count").progress == 0


async def test_one_job_is_at_work_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as jobs:
        count = jobs.begin("count")
        with pytest.raises(InUse, match=r"its count is at work; an image has one job at a time"):
            jobs.begin("count")
        await count.pause()
        await trio.sleep(100)
        assert jobs.at_work is count
        count.cancel()
        await trio.sleep(1)
        jobs.stream.start()
        with pytest.raises(InUse, match=r"its stream is at work"):
            jobs.begin("count")
        await trio.sleep(100)
        assert jobs.stream.state is State.COMPLETE
        jobs.begin("count")


@pytest.mark.expect_log("the count has stopped")
async def test_a_job_that_has_failed_or_was_cancelled_is_gone(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as jobs:
        failed = jobs.begin("count")
        assert isinstance(failed, CountJob)
        failed.failures[1] = SourceError("404")
        await trio.sleep(100)
        assert (failed.state, str(failed.error)) == (State.FAILED, "404")
        cancelled = jobs.begin("count")
        await trio.sleep(1.5)
        cancelled.cancel()
        assert jobs.at_work is cancelled  # until its step has ended
        await trio.sleep(100)
        assert cancelled.state is State.OFF
        assert jobs.all() == [jobs.stream]


async def test_it_holds_off_as_the_stream_does(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        jobs = ImageJobs(StreamJob(image, enabled=False, hold_off=lambda: "busy"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(jobs.run)
            await trio.testing.wait_all_tasks_blocked()
            job = jobs.begin("count")
            await trio.sleep(10)
            assert (job.state, job.reason, job.progress) == (State.WAITING, "busy", 0)
            nursery.cancel_scope.cancel()


async def test_a_job_that_is_begun_early_runs_with_the_others(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image, trio.open_nursery() as nursery:
        jobs = ImageJobs(StreamJob(image, enabled=False))
        job = jobs.begin("count")
        await trio.sleep(10)
        assert job.state is State.OFF
        nursery.start_soon(jobs.run)
        await trio.sleep(100)
        assert state_of(job) is State.COMPLETE
        nursery.cancel_scope.cancel()


async def test_a_kind_that_does_not_exist() -> None:
    async with running() as jobs:
        with pytest.raises(KeyError):
            jobs.begin("nothing of the kind")
        assert jobs.all() == [jobs.stream]
