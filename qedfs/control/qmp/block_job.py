"""A block job as in QEMU, with an id, a status and events: presents one run of a `Job` to QMP clients.

Owns the life of a block job from `created` to `null`, and the order of its events (qapi/job.json,
qapi/block-core.json). Must not know other jobs, nor the clients; events are sent through `emit`.

The `Job` calls `judge` for the policy on an error, and `may_finish` before it finishes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import trio

from qedfs.control.qmp.errors import QmpError
from qedfs.errors import NoSpace, QedfsError
from qedfs.jobs.job import Action, Job, usual_action
from qedfs.jobs.state import ENDED, State

Emit = Callable[[str, dict[str, Any]], None]


class Status(enum.StrEnum):
    """JobStatus of qapi/job.json, restricted to the values that our jobs can have."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


# The states in which each command is accepted: JobVerbTable of QEMU's job.c.
_RUNS = frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED})
ALLOWED = {
    "pause": _RUNS,
    "resume": _RUNS,
    "set-speed": _RUNS,
    "cancel": _RUNS | {Status.WAITING, Status.PENDING},
    "complete": frozenset[Status](),  # only for jobs that become ready, which none of ours does
    "finalize": frozenset({Status.PENDING}),
    "dismiss": frozenset({Status.CONCLUDED}),
}
# What each `on-error` does. "retry" is an extension, for jobs that started with the mount.
_POLICIES: dict[str, Callable[[QedfsError], Action]] = {
    "retry": usual_action,
    "report": lambda _: Action.STOP,
    "stop": lambda _: Action.HOLD,
    "ignore": lambda _: Action.IGNORE,
    "enospc": lambda error: Action.HOLD if isinstance(error, NoSpace) else Action.STOP,
}
_POLICIES["auto"] = _POLICIES["enospc"]
_ACTION_NAMES = {Action.HOLD: "stop", Action.STOP: "report", Action.IGNORE: "ignore"}


@dataclasses.dataclass(frozen=True, slots=True)
class Wishes:
    """The options with which a client requested a job."""

    on_error: str = "retry"
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BlockJob:
    """One block job, as QMP clients see it."""

    def __init__(self, job_id: str, job: Job, wishes: Wishes, emit: Emit, *, nothing: bool = False) -> None:
        """`nothing`: there is nothing to do, so the job only passes through its states."""
        self.id = job_id
        self.job = job
        self.wishes = wishes
        self.status = Status.UNDEFINED
        self.error: str | None = None
        self.io_status = "ok"
        self._emit = emit
        self._nothing = nothing
        self._cancelled = False
        self._finishing = False  # past the point of no return
        self._finalized = trio.Event()
        self._change(Status.CREATED)

    @property
    def position(self) -> tuple[int, int]:
        """(offset, len) in bytes; both 0 if there was nothing to do from the start, as in QEMU."""
        return (0, 0) if self._nothing else (self.job.progress, self.job.total)

    def require(self, verb: str) -> None:
        """Raise QmpError unless the job accepts this command in its state."""
        if self.status not in ALLOWED[verb]:
            self._refuse(verb)

    def _refuse(self, verb: str) -> None:
        raise QmpError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    # Commands of clients.

    async def pause(self) -> None:
        """Pause the job."""
        self.require("pause")
        if self.job.paused:
            raise QmpError("Job is already paused")
        await self.job.pause()

    async def resume(self) -> None:
        """Resume the job."""
        if not self.job.paused and self.status is not Status.PAUSED:
            raise QmpError("Can't resume a job that was not paused")
        self.require("resume")
        await self.job.resume()

    def cancel(self) -> None:
        """Cancel the job. Keeps what has been done."""
        self.require("cancel")
        if self._finishing:
            self._refuse("cancel")
        self._cancelled = True
        if self.status is Status.PAUSED:
            self._change(Status.RUNNING)
        self._change(Status.ABORTING)
        self.job.cancel()
        self._finalized.set()
        if self.job.state is State.OFF or self.job.state in ENDED:
            # It had not started, so its task will not report an end.
            self.end()

    def finalize(self) -> None:
        """Let a pending job finish."""
        self.require("finalize")
        self._finalized.set()

    # Called by the job.

    def judge(self, error: QedfsError) -> Action:
        """What to do about a failure. Sends an event to the clients, unless the job only retries."""
        action = _POLICIES[self.wishes.on_error](error)
        if action in (Action.HOLD, Action.RETRY):
            self.io_status = "nospace" if isinstance(error, NoSpace) else "failed"
        if action in _ACTION_NAMES:
            data = {"device": self.id, "operation": "read", "action": _ACTION_NAMES[action]}
            self._emit("BLOCK_JOB_ERROR", data)
        return action

    async def may_finish(self) -> bool:
        """Called when nothing is left to do. Waits for the client if it wants to finalize the job itself."""
        if self._cancelled:
            return False
        self._change(Status.WAITING)
        self._change(Status.PENDING)
        if not self.wishes.auto_finalize:
            self._emit("BLOCK_JOB_PENDING", {"type": self.job.kind, "id": self.id})
            await self._finalized.wait()
        self._finishing = not self._cancelled
        return self._finishing

    def follow(self) -> None:
        """Update the status after a change of the job's state."""
        state = self.job.state
        self._finishing = False
        if state in ENDED or state is State.OFF:
            self.end()
        elif self._cancelled:
            return
        elif state is State.PAUSED:
            self._change(Status.PAUSED)
        else:
            if state is State.RUNNING:
                self.io_status = "ok"
            self._change(Status.RUNNING)

    def end(self) -> None:
        """Conclude the block job, according to how the job has ended."""
        if self.status in (Status.CONCLUDED, Status.NULL):
            return
        if self.job.state is State.COMPLETE or self._nothing:
            # A job that found nothing to do still passes through all states.
            for status in (Status.RUNNING, Status.WAITING, Status.PENDING):
                if list(Status).index(self.status) < list(Status).index(status):
                    self._change(status)
            self._emit("BLOCK_JOB_COMPLETED", self._result())
        elif self.job.state in ENDED and not self._cancelled:
            self.error = self.job.reason
            self._change(Status.ABORTING)
            self._emit("BLOCK_JOB_COMPLETED", {**self._result(), "error": self.error})
        else:
            # Cancelled, or its image has left the mount.
            self._change(Status.ABORTING)
            self._emit("BLOCK_JOB_CANCELLED", self._result())
        self._change(Status.CONCLUDED)
        if self.wishes.auto_dismiss:
            self._change(Status.NULL)

    def dismiss(self) -> None:
        """Dismiss the concluded job."""
        self.require("dismiss")
        self._change(Status.NULL)

    def describe(self) -> dict[str, Any]:
        """One element of `query-block-jobs`."""
        offset, length = self.position
        found = {
            "type": self.job.kind,
            "device": self.id,
            "len": length,
            "offset": offset,
            "busy": self.status is Status.RUNNING,
            "paused": self.job.paused or self.status is Status.PAUSED,
            "speed": self.job.rate_limiter.limit,
            "io-status": self.io_status,
            "ready": False,
            "status": str(self.status),
            "auto-finalize": self.wishes.auto_finalize,
            "auto-dismiss": self.wishes.auto_dismiss,
        }
        return found if self.error is None else {**found, "error": self.error}

    def describe_briefly(self) -> dict[str, Any]:
        """One element of `query-jobs`."""
        offset, length = self.position
        found = {
            "id": self.id,
            "type": self.job.kind,
            "status": str(self.status),
            "current-progress": offset,
            "total-progress": length,
        }
        return found if self.error is None else {**found, "error": self.error}

    def _result(self) -> dict[str, Any]:
        offset, length = self.position
        return {
            "type": self.job.kind,
            "device": self.id,
            "len": length,
            "offset": offset,
            "speed": self.job.rate_limiter.limit,
        }

    def _change(self, status: Status) -> None:
        if status is not self.status:
            self.status = status
            self._emit("JOB_STATUS_CHANGE", {"id": self.id, "status": str(status)})
