"""The block jobs of a mount: which of them stands for which `Job` of an image, and who is called what.

Owns the ids, and QEMU's rule that an image has one block job at a time. A stream is there as long as its image; a block
job is there while it has something to do, and afterwards if the client wants to dismiss it itself. A job that begins by
itself, with the mount, has the image's name as its id.
"""

from __future__ import annotations

import itertools

from qedfs.control.port import Mounted, ServedImage
from qedfs.control.qmp.block_job import BlockJob, Emit, Status, Wishes
from qedfs.control.qmp.errors import DeviceNotActive, QmpError
from qedfs.errors import QedfsError
from qedfs.image.image import Image
from qedfs.jobs.job import Action, Driver, Job, usual_action
from qedfs.jobs.state import ENDED, State

SUFFIX = ".raw"


class Jobs(Driver):
    """All block jobs, and the driver of the `Job`s that they stand for.

    Call `sync` before looking: images come and go with their overlays.
    """

    def __init__(self, mount: Mounted, emit: Emit) -> None:
        self._mount = mount
        self._emit = emit
        self._names: dict[Job, str] = {}  # of the images of the jobs that we supervise
        self._active: dict[Image, BlockJob] = {}
        self._by_id: dict[str, BlockJob] = {}

    def sync(self) -> None:
        """Take note of images that have come, and end the jobs of those that have gone."""
        there = {
            job: device_name(served)
            for served in self._mount.everything()
            if served.jobs is not None
            for job in served.jobs.all()
        }
        for job in self._names.keys() - there.keys():
            del self._names[job]
            if (block := self.active(job)) is not None:
                block.end()
                self._tidy(block)
        for job, name in there.items():
            if job not in self._names:
                self._adopt(job, name)

    def all(self) -> list[BlockJob]:
        """Every job that is not forgotten."""
        return list(self._by_id.values())

    def job(self, job_id: str) -> BlockJob:
        """The job of this id, for the `job-*` commands."""
        if job_id not in self._by_id:
            raise QmpError("Job not found")
        return self._by_id[job_id]

    def block_job(self, job_id: str) -> BlockJob:
        """The job of this id, for the `block-job-*` commands, which fail in another way."""
        if job_id not in self._by_id:
            raise DeviceNotActive(f"Block job '{job_id}' not found")
        return self._by_id[job_id]

    def active(self, job: Job) -> BlockJob | None:
        """The block job that is under way for this job."""
        block = self._active.get(job.image)
        return block if block is not None and block.job is job else None

    def check_free(self, image: Image, name: str) -> None:
        """Raise QmpError if the image has a block job. `name`: of its node."""
        if (block := self._active.get(image)) is not None:
            raise QmpError(f"Node '{name}' is busy: block device is in use by block job: {block.job.kind}")

    def begin(self, job: Job, name: str, job_id: str, wishes: Wishes, *, nothing: bool = False) -> BlockJob:
        """A new block job for a job that the caller starts. `name`: of the image's node.

        Raises:
            QmpError: the image has a block job already, or the id is taken.
        """
        self.check_free(job.image, name)
        if job_id in self._by_id:
            raise QmpError(f"Job ID '{job_id}' already in use")
        self._names[job] = name
        job.attach(self)
        block = BlockJob(job_id, job, wishes, self._emit, nothing=nothing)
        self._by_id[job_id] = block
        self._active[job.image] = block
        return block

    def free_id(self, name: str) -> str:
        """An id for a job on the node `name`: a concluded job that nobody has dismissed may still have the name."""
        numbered = (f"{name}-{number}" for number in itertools.count(1))
        return next(found for found in itertools.chain([name], numbered) if found not in self._by_id)

    def settle(self, block: BlockJob) -> None:
        """End a block job whose `Job` will tell nothing of any more."""
        block.end()
        self._tidy(block)

    def dismiss(self, block: BlockJob) -> None:
        """Forget a job that has concluded."""
        block.dismiss()
        self._tidy(block)

    def cancel(self, block: BlockJob) -> None:
        """Cancel a job; see `BlockJob.cancel`."""
        block.cancel()
        self._tidy(block)

    # What the jobs tell and ask.

    def changed(self, job: Job) -> None:
        """See `Driver`. A job that runs without a client having asked for it gets its block job here."""
        block = self.active(job)
        if block is None and job.state not in ENDED and job.state is not State.OFF:
            block = self._begin_unasked(job)
        if block is not None:
            self._follow(block)

    def judge(self, job: Job, error: QedfsError) -> Action:
        """See `Driver`."""
        block = self.active(job)
        return usual_action(error) if block is None else block.judge(error)

    async def may_finish(self, job: Job) -> bool:
        """See `Driver`."""
        block = self.active(job)
        return block is None or await block.may_finish()

    # Inside.

    def _adopt(self, job: Job, name: str) -> None:
        self._names[job] = name
        job.attach(self)
        if job.enabled and job.state not in ENDED and (block := self._begin_unasked(job)) is not None:
            self._follow(block)

    def _begin_unasked(self, job: Job) -> BlockJob | None:
        name = self._names.get(job)
        if name is None or job.image in self._active:
            return None
        return self.begin(job, name, self.free_id(name), Wishes())

    def _follow(self, block: BlockJob) -> None:
        # A job that has just been told to run is still off, and has not ended.
        if block.status is not Status.CREATED or block.job.state is not State.OFF:
            block.follow()
        self._tidy(block)

    def _tidy(self, block: BlockJob) -> None:
        if block.status in (Status.CONCLUDED, Status.NULL) and self._active.get(block.job.image) is block:
            del self._active[block.job.image]
        if block.status is Status.NULL and self._by_id.get(block.id) is block:
            del self._by_id[block.id]


def device_name(served: ServedImage) -> str:
    """What QMP calls an image: disk.raw is the device and the node disk."""
    return served.name.removesuffix(SUFFIX)
