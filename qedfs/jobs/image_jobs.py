"""The jobs of one image: its stream, which is there as long as the image, and the jobs that commands begin.

Owns the rule that an image has one job at work at a time, as a node of QEMU has, and the tasks of the jobs that were
begun. Must not know what a job does, nor who begins one.
"""

from __future__ import annotations

import trio

from qedfs.errors import InUse, QedfsError
from qedfs.jobs.job import Job
from qedfs.jobs.kinds import KINDS
from qedfs.jobs.stream import StreamJob


class ImageJobs:
    """The jobs of one image. Whoever made the stream runs its task; `run` runs those of the other jobs."""

    def __init__(self, stream: StreamJob) -> None:
        self.stream = stream
        self._begun: list[Job] = []
        self._nursery: trio.Nursery | None = None

    def all(self) -> list[Job]:
        """The stream, and every job that has been begun and has not ended."""
        return [self.stream, *self._begun]

    @property
    def at_work(self) -> Job | None:
        """The job that keeps the image from having another one; paused and waiting jobs do, too."""
        return next((job for job in self.all() if job.active), None)

    def begin(self, kind: str, *, limit: int = 0) -> Job:
        """Make a job of this kind, which runs as soon as `run` does; it is gone when it has ended, whatever the end.

        `limit`: bytes per second, 0 for none.

        Raises:
            InUse: another job is at work.
            KeyError: there is no such kind.
        """
        if (other := self.at_work) is not None:
            raise InUse(f"{self.stream.image.name}: its {other.kind} is at work; an image has one job at a time")
        job = KINDS[kind](self.stream.image, limit=limit, hold_off=self.stream.hold_off)
        self._begun.append(job)
        if self._nursery is not None:
            self._nursery.start_soon(self._run_begun, job)
        return job

    def fail(self, error: QedfsError) -> None:
        """Fail every job: the overlay is not what they were made for."""
        for job in self.all():
            job.fail(error)
        for job in self._begun:
            job.poke()  # its task may end now, since nobody starts it again

    async def run(self) -> None:
        """Run the tasks of the jobs that are begun; runs until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for job in self._begun:
                self._nursery.start_soon(self._run_begun, job)
            await trio.sleep_forever()

    async def _run_begun(self, job: Job) -> None:
        try:
            await job.run(once=True)
        finally:
            self._begun.remove(job)
