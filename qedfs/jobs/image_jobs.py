"""The jobs of one image: its stream, which exists as long as the image, and the jobs that commands start.

Owns the rule that an image has one active job at a time, as a node in QEMU, and the tasks of the jobs that commands
start. Must not know what a job does, nor who starts one.
"""

from __future__ import annotations

import trio

from qedfs.errors import InUse, QedfsError
from qedfs.jobs.job import Job
from qedfs.jobs.kinds import KINDS
from qedfs.jobs.populate import Populate
from qedfs.jobs.stream import StreamJob
from qedfs.source.retrying import RetryingSource


class ImageJobs:
    """The jobs of one image. `run` runs the tasks of all jobs except the stream, whose creator runs it."""

    def __init__(self, stream: StreamJob) -> None:
        self.stream = stream
        self.populate: Populate | None = None  # the rescue that runs, or the last one
        self.other: Job | None = None  # the job beside the stream that runs, or the last one
        self._begun: list[Job] = []
        self._nursery: trio.Nursery | None = None

    def all(self) -> list[Job]:
        """The stream, and all other jobs that were started and have not ended."""
        return [self.stream, *self._begun]

    @property
    def at_work(self) -> Job | None:
        """The active job, because of which the image cannot have another one. Includes paused and waiting jobs."""
        return next((job for job in self.all() if job.active), None)

    def begin(self, kind: str, *, limit: int = 0) -> Job:
        """Start a job of this kind. It runs as soon as `run` does, and disappears when it has ended, well or not.

        `limit`: bytes per second, 0 for none.

        Raises:
            InUse: another job is active.
            KeyError: there is no such kind.
        """
        self.check_free(kind)
        job = KINDS[kind](self.stream.image, limit=limit, hold_off=self.stream.hold_off)
        self._begun.append(job)
        self.other = job
        if self._nursery is not None:
            self._nursery.start_soon(self._run_begun, job)
        return job

    def check_free(self, kind: str) -> None:
        """Raise InUse if the image cannot have a job of this kind now."""
        if (other := self.at_work) is not None:
            raise InUse(f"{self.stream.image.name}: its {other.kind} is at work; an image has one job at a time")
        if KINDS[kind].writes_source and self.populate is not None and self.populate.active:
            raise InUse(f"{self.stream.image.name}: is being populated from {self.populate.copy.location}")

    def begin_populate(self, copy: RetryingSource, *, force: bool) -> None:
        """Populate the image from another copy of its source; see `Populate`. Raises InUse if that is under way."""
        if self.populate is not None and self.populate.active:
            raise InUse(f"{self.stream.image.name}: is being populated from {self.populate.copy.location} already")
        if (job := self.at_work) is not None and job.writes_source:
            raise InUse(
                f"{self.stream.image.name}: is being committed into its backing; qedfs commit --cancel ends that"
            )
        if self._nursery is None:
            raise QedfsError(f"{self.stream.image.name}: has no tasks, so that nothing can run")
        self.populate = Populate(self.stream.image, copy, force=force)
        self._nursery.start_soon(self._run_populate, self.populate)

    async def _run_populate(self, populate: Populate) -> None:
        await populate.run()
        self.stream.poke()  # the image may be complete

    def fail(self, error: QedfsError) -> None:
        """Fail every job, because the overlay is no longer usable."""
        for job in self.all():
            job.fail(error)
        for job in self._begun:
            job.poke()  # let its task end, because nobody will start it again

    async def run(self) -> None:
        """Run the tasks of the started jobs, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for job in self._begun:
                self._nursery.start_soon(self._run_begun, job)
            await trio.sleep_forever()

    async def _run_begun(self, job: Job) -> None:
        try:
            await job.run(once=True)
        finally:
            self._begun.remove(job)
