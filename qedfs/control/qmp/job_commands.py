"""The QMP commands for jobs: `block-stream`, `job-*`, `block-job-*` and the queries, with QEMU's messages.

Owns QEMU's rules for their arguments, and what other commands share: how a client names an image (`find_served`), and
which images are refused. The block jobs themselves are in `jobs.py`. Must not know how a job does its work.
"""

from __future__ import annotations

import re
from typing import Any

from qedfs.control.monitoring.status import SETTLING
from qedfs.control.port import ServedImage
from qedfs.control.qmp.block_job import BlockJob, Wishes
from qedfs.control.qmp.command import Arg, Arguments, Commands
from qedfs.control.qmp.errors import QmpError
from qedfs.control.qmp.jobs import device_name
from qedfs.control.qmp.state import Call
from qedfs.errors import InStandby
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob

Nothing = dict[str, Any]

ON_ERROR = ("report", "ignore", "enospc", "stop", "auto")
JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")  # id_wellformed() of QEMU

job_commands: Commands[Call] = Commands()


def find_served(call: Call, device: str) -> tuple[ServedImage, Image, StreamJob]:
    """The served image that a client calls `device`: disk or disk.raw. Raises QmpError."""
    for served in call.control.mount.everything():
        if device in (served.name, device_name(served)):
            if served.image is None or served.jobs is None:
                raise QmpError(f"Device '{device}' cannot be served: {served.error or SETTLING}")
            return served, served.image, served.jobs.stream
    raise QmpError(f"Cannot find device='{device}' nor node-name='{device}'")


@job_commands(
    "block-stream",
    Arg("job-id", optional=True),
    Arg("device"),
    Arg("base", optional=True),
    Arg("base-node", optional=True),
    Arg("backing-file", optional=True),
    Arg("bottom", optional=True),
    Arg("speed", "integer", optional=True),
    Arg("on-error", ON_ERROR, optional=True),
    Arg("filter-node-name", optional=True),
    Arg("auto-finalize", "boolean", optional=True),
    Arg("auto-dismiss", "boolean", optional=True),
)
async def _block_stream(call: Call, arguments: Arguments) -> Nothing:
    """Fetch what is missing, then drop the backing."""
    refuse_two(arguments, "base", "base-node")
    refuse_two(arguments, "base", "bottom")
    refuse_two(arguments, "bottom", "base-node")
    served, image, stream = find_served(call, arguments["device"])
    nothing = image.complete or _ends_above_backing(call, image, served, arguments)
    if "backing-file" in arguments and not nothing:
        raise QmpError("backing file specified, but streaming the entire chain")
    speed = given_speed(arguments) if "speed" in arguments else None
    job_id = arguments.get("job-id", device_name(served))
    if "job-id" in arguments and not JOB_ID.fullmatch(job_id):
        raise QmpError(f"Invalid job ID '{job_id}'")
    if not image.writable:
        raise QmpError("Block node is read-only")
    check_active(served, image)
    wishes = given_wishes(arguments)
    jobs = call.control.jobs
    block = jobs.begin(stream, device_name(served), job_id, wishes, nothing=nothing)
    if nothing:
        jobs.settle(block)
    else:
        await begin_stream(stream, speed or 0)
    return {}


def check_active(served: ServedImage, image: Image) -> None:
    """Raise InStandby for an image in standby, which keeps nothing of its source."""
    if image.in_standby:
        raise InStandby(f"{served.name}: is in standby and keeps nothing of its source; qedfs activate ends that")


async def begin_stream(stream: StreamJob, limit: int | None) -> None:
    """Start a stream with this limit. Also ends a pause that is recorded in the overlay."""
    stream.start(limit)
    if stream.image.overlay.record.paused:
        await stream.resume()


def _ends_above_backing(call: Call, image: Image, served: ServedImage, arguments: Arguments) -> bool:
    """Whether the client wants to keep the backing. There is only one, so nothing would be left to stream."""
    name = device_name(served)
    if "base" in arguments:
        # The name in the overlay, and the one that `query-block` shows, without secrets.
        shown = None if image.source is None else str(image.source.location)
        if arguments["base"] not in (image.overlay.backing, shown):
            raise QmpError(f"Can't find '{arguments['base']}' in the backing chain")
        return True
    if "base-node" in arguments:
        # Only images are nodes, and none is the backing of another one.
        base = arguments["base-node"]
        if any(base == device_name(node) for node in call.control.mount.everything() if node.image is not None):
            raise QmpError(f"Node '{base}' is not a backing image of '{arguments['device']}'")
        raise QmpError(f"Cannot find device='' nor node-name='{base}'")
    if "bottom" in arguments:
        if arguments["bottom"] != name:
            raise QmpError(f"Cannot find device='' nor node-name='{arguments['bottom']}'")
        return True
    return False


def refuse_two(arguments: Arguments, one: str, other: str) -> None:
    """Raise QmpError if both arguments are given."""
    if one in arguments and other in arguments:
        raise QmpError(f"'{one}' and '{other}' cannot be specified at the same time")


def given_wishes(arguments: Arguments) -> Wishes:
    """What a client wants of the job that it begins."""
    return Wishes(
        on_error=arguments.get("on-error", "report"),
        auto_finalize=arguments.get("auto-finalize", True),
        auto_dismiss=arguments.get("auto-dismiss", True),
    )


def given_speed(arguments: Arguments) -> int:
    """The argument `speed`, which is given. Raises QmpError if it is negative."""
    speed: int = arguments["speed"]
    if speed < 0:
        raise QmpError("Parameter 'speed' expects a non-negative value")
    return speed


# Commands for one job, with their older and newer names.


@job_commands("query-block-jobs")
async def _query_block_jobs(call: Call, _: Arguments) -> list[dict[str, Any]]:
    return [block.describe() for block in call.control.jobs.all()]


@job_commands("query-jobs")
async def _query_jobs(call: Call, _: Arguments) -> list[dict[str, Any]]:
    return [block.describe_briefly() for block in call.control.jobs.all()]


@job_commands("block-job-set-speed", Arg("device"), Arg("speed", "integer"))
async def _set_speed(call: Call, arguments: Arguments) -> Nothing:
    block = call.control.jobs.block_job(arguments["device"])
    block.require("set-speed")
    block.job.set_limit(given_speed(arguments))
    return {}


@job_commands("block-job-cancel", Arg("device"), Arg("force", "boolean", optional=True))
async def _block_job_cancel(call: Call, arguments: Arguments) -> Nothing:
    block = call.control.jobs.block_job(arguments["device"])
    if block.job.paused and not arguments.get("force", False):
        raise QmpError(f"The block job for device '{block.id}' is currently paused")
    call.control.jobs.cancel(block)
    return {}


@job_commands("job-cancel", Arg("id"))
async def _job_cancel(call: Call, arguments: Arguments) -> Nothing:
    call.control.jobs.cancel(call.control.jobs.job(arguments["id"]))
    return {}


async def _pause(call: Call, block: BlockJob) -> None:
    await block.pause()


async def _resume(call: Call, block: BlockJob) -> None:
    await block.resume()


async def _complete(call: Call, block: BlockJob) -> None:
    block.require("complete")


async def _finalize(call: Call, block: BlockJob) -> None:
    block.finalize()


async def _dismiss(call: Call, block: BlockJob) -> None:
    call.control.jobs.dismiss(block)


# Of the older commands, some call the job's id `device`, others `id`.
_VERBS = {
    "pause": (_pause, "device"),
    "resume": (_resume, "device"),
    "complete": (_complete, "device"),
    "finalize": (_finalize, "id"),
    "dismiss": (_dismiss, "id"),
}


def _register(verb: str) -> None:
    act, key = _VERBS[verb]

    async def by_block_job(call: Call, arguments: Arguments) -> Nothing:
        await act(call, call.control.jobs.block_job(arguments[key]))
        return {}

    async def by_job(call: Call, arguments: Arguments) -> Nothing:
        await act(call, call.control.jobs.job(arguments["id"]))
        return {}

    job_commands(f"block-job-{verb}", Arg(key))(by_block_job)
    job_commands(f"job-{verb}", Arg("id"))(by_job)


for _verb in _VERBS:
    _register(_verb)
