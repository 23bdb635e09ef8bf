"""The block jobs of a mount: their ids, and which `Job` of an image each of them presents.

Owns the ids, and QEMU's rule that an image has one block job at a time. Must not know what a job does to its image, nor
which command asks. A stream exists as long as its image. A block job exists while it has something to do, and then
until it is dismissed, if the client has asked to do that itself. A job that starts by itself, with the mount, has the
image's name as its id.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from qedfs.control.port import Mounted, ServedImage
from qedfs.control.qmp.block_job import BlockJob, Emit, Status, Wishes
from qedfs.control.qmp.errors import DeviceNotActive, QmpError
from qedfs.errors import QedfsError
from qedfs.image.image import Image
from qedfs.jobs.job import Action, Driver, Job, usual_action
from qedfs.jobs.state import ENDED, State

SUFFIX = ".raw"


class Jobs(Driver):
    """All block jobs, and the driver of the `Job`s that they present.

    Call `sync` before a look-up, because images appear and disappear with their overlays.
    """

    def __init__(self, mount: Mounted, emit: Emit) -> None:
        self._mount = mount
        self._emit = emit
        self._names: dict[Job, str] = {}  # the image's name, for each job that this drives
        self._active: dict[Image, BlockJob] = {}
        self._by_id: dict[str, BlockJob] = {}
        self._synced: Sequence[ServedImage] | None = None  # what `sync` has seen, if it would find the same again

    def sync(self) -> None:
        """Add the jobs of images that have appeared, and end the jobs of those that have disappeared."""
        everything = self._mount.everything()
        if everything is self._synced:
            return
        there = {
            job: device_name(served) for served in everything if served.jobs is not None for job in served.jobs.all()
        }
        for job in self._names.keys() - there.keys():
            del self._names[job]
            if (block := self.active(job)) is not None:
                block.end()
                self._tidy(block)
        for job, name in there.items():
            if job not in self._names:
                self._adopt(job, name)
        # A job that was begun by a command comes and goes with no image.
        only_streams = len(there) == sum(served.jobs is not None for served in everything)
        self._synced = everything if only_streams else None

    def all(self) -> list[BlockJob]:
        """All block jobs that have not been dismissed."""
        return list(self._by_id.values())

    def job(self, job_id: str) -> BlockJob:
        """The block job with this id, for the `job-*` commands."""
        if job_id not in self._by_id:
            raise QmpError("Job not found")
        return self._by_id[job_id]

    def block_job(self, job_id: str) -> BlockJob:
        """The block job with this id, for the `block-job-*` commands, which have another error."""
        if job_id not in self._by_id:
            raise DeviceNotActive(f"Block job '{job_id}' not found")
        return self._by_id[job_id]

    def active(self, job: Job) -> BlockJob | None:
        """The active block job that presents this job, or None."""
        block = self._active.get(job.image)
        return block if block is not None and block.job is job else None

    def check_free(self, image: Image, name: str) -> None:
        """Raise QmpError if the image has a block job. `name`: that of its node."""
        if (block := self._active.get(image)) is not None:
            raise QmpError(f"Node '{name}' is busy: block device is in use by block job: {block.job.kind}")

    def check_id(self, job_id: str) -> None:
        """Raise QmpError if the id is taken."""
        if job_id in self._by_id:
            raise QmpError(f"Job ID '{job_id}' already in use")

    def begin(self, job: Job, name: str, job_id: str, wishes: Wishes, *, nothing: bool = False) -> BlockJob:
        """Create a block job for a job that the caller starts. `name`: that of the image's node.

        Raises:
            QmpError: the image has a block job already, or the id is taken.
        """
        self.check_free(job.image, name)
        self.check_id(job_id)
        self._names[job] = name
        self._synced = None
        job.attach(self)
        block = BlockJob(job_id, job, wishes, self._emit, nothing=nothing)
        self._by_id[job_id] = block
        self._active[job.image] = block
        return block

    def free_id(self, name: str) -> str:
        """A free id for a job on the node `name`. A concluded job that was not dismissed may still have the name."""
        numbered = (f"{name}-{number}" for number in itertools.count(1))
        return next(found for found in itertools.chain([name], numbered) if found not in self._by_id)

    def settle(self, block: BlockJob) -> None:
        """End a block job whose `Job` will not report anything any more."""
        block.end()
        self._tidy(block)

    def dismiss(self, block: BlockJob) -> None:
        """Dismiss a job that has concluded."""
        block.dismiss()
        self._tidy(block)

    def cancel(self, block: BlockJob) -> None:
        """Cancel a job, see `BlockJob.cancel`."""
        block.cancel()
        self._tidy(block)

    # The methods of `Driver`.

    def changed(self, job: Job) -> None:
        """See `Driver`. Creates a block job for a job that runs without a client having requested it."""
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
        # A job that was just told to run is still off, but has not ended.
        if block.status is not Status.CREATED or block.job.state is not State.OFF:
            block.follow()
        self._tidy(block)

    def _tidy(self, block: BlockJob) -> None:
        if block.status in (Status.CONCLUDED, Status.NULL) and self._active.get(block.job.image) is block:
            del self._active[block.job.image]
        if block.status is Status.NULL and self._by_id.get(block.id) is block:
            del self._by_id[block.id]


def device_name(served: ServedImage) -> str:
    """The name of an image in QMP, as device and node: disk for disk.raw."""
    return served.name.removesuffix(SUFFIX)
