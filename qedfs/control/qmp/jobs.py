"""The block jobs of a mount: which stream is which job, and who is called what.

Owns the ids. A StreamJob is there as long as its image; a block job is there while it has something to do, and after it
if the client wants to dismiss it itself. A stream that begins by itself, with the mount, is a job with the image's name
as its id.
"""

from __future__ import annotations

import functools
import itertools

from qedfs.control.port import Mounted, ServedImage
from qedfs.control.qmp.block_job import ENDED, BlockJob, Emit, Status, Wishes
from qedfs.control.qmp.errors import DeviceNotActive, QmpError
from qedfs.errors import QedfsError
from qedfs.jobs.stream import Action, State, StreamJob, usual_action

SUFFIX = ".raw"


class Jobs:
    """All block jobs. Call `sync` before looking: images come and go with their overlays."""

    def __init__(self, mount: Mounted, emit: Emit) -> None:
        self._mount = mount
        self._emit = emit
        self._names: dict[StreamJob, str] = {}  # of the streams that we listen to
        self._active: dict[StreamJob, BlockJob] = {}
        self._by_id: dict[str, BlockJob] = {}

    def sync(self) -> None:
        """Take note of images that have come, and end the jobs of those that have gone."""
        there = {served.job: device_name(served) for served in self._mount.everything() if served.job is not None}
        for stream in self._names.keys() - there.keys():
            del self._names[stream]
            if (block := self._active.get(stream)) is not None:
                block.end()
                self._tidy(block)
        for stream, name in there.items():
            if stream not in self._names:
                self._adopt(stream, name)

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

    def active(self, stream: StreamJob) -> BlockJob | None:
        """The job that is under way for this stream."""
        return self._active.get(stream)

    def begin(self, stream: StreamJob, name: str, job_id: str, wishes: Wishes, *, nothing: bool = False) -> BlockJob:
        """A new job for a stream; the caller starts the stream. `name`: of the image's node.

        Raises:
            QmpError: the image has a job already, or the id is taken.
        """
        if stream in self._active:
            raise QmpError(f"Node '{name}' is busy: block device is in use by block job: stream")
        if job_id in self._by_id:
            raise QmpError(f"Job ID '{job_id}' already in use")
        block = BlockJob(job_id, stream, wishes, self._emit, nothing=nothing)
        self._by_id[job_id] = block
        self._active[stream] = block
        return block

    def free_id(self, name: str) -> str:
        """An id for a job on the node `name`: a concluded job that nobody has dismissed may still have the name."""
        numbered = (f"{name}-{number}" for number in itertools.count(1))
        return next(found for found in itertools.chain([name], numbered) if found not in self._by_id)

    def settle(self, block: BlockJob) -> None:
        """End a job that its stream will tell nothing of any more."""
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

    # Inside.

    def _adopt(self, stream: StreamJob, name: str) -> None:
        self._names[stream] = name
        stream.listeners.append(self._follow)
        stream.judge = functools.partial(self._judge, stream)
        stream.may_detach = functools.partial(self._may_detach, stream)
        if stream.enabled and stream.state not in ENDED:
            self._begin_unasked(stream)
            self._follow_if_begun(stream)

    def _begin_unasked(self, stream: StreamJob) -> BlockJob | None:
        """A job for a stream that runs without a QMP client having asked for it."""
        name = self._names.get(stream)
        if name is None:
            return None
        return self.begin(stream, name, self.free_id(name), Wishes())

    def _follow(self, stream: StreamJob) -> None:
        if stream not in self._active and (stream.state in ENDED or stream.state is State.OFF):
            return
        if stream in self._active or self._begin_unasked(stream) is not None:
            self._follow_if_begun(stream)

    def _follow_if_begun(self, stream: StreamJob) -> None:
        block = self._active[stream]
        if block.status is not Status.CREATED or stream.state is not State.OFF:
            block.follow()
        self._tidy(block)

    def _judge(self, stream: StreamJob, error: QedfsError) -> Action:
        block = self._active.get(stream)
        return usual_action(error) if block is None else block.judge(error)

    async def _may_detach(self, stream: StreamJob) -> bool:
        block = self._active.get(stream)
        return block is None or await block.may_detach()

    def _tidy(self, block: BlockJob) -> None:
        if block.status in (Status.CONCLUDED, Status.NULL) and self._active.get(block.stream) is block:
            del self._active[block.stream]
        if block.status is Status.NULL and self._by_id.get(block.id) is block:
            del self._by_id[block.id]


def device_name(served: ServedImage) -> str:
    """What QMP calls an image: disk.raw is the device and the node disk."""
    return served.name.removesuffix(SUFFIX)
