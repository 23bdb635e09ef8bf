"""QMP's `block-commit`: the overlay of an image into its backing.

Owns its arguments and QEMU's messages for those that it refuses. Must not know how bytes get into the backing
(`jobs/commit.py`).

Unlike QEMU's commit of an active layer, the job ends by itself, without BLOCK_JOB_READY and `block-job-complete`: the
image does not become its backing, but stays what it is, and the overlay keeps what guests have written meanwhile.
"""

from __future__ import annotations

from qedfs.control.qmp.command import Arg, Arguments, Commands
from qedfs.control.qmp.errors import QmpError
from qedfs.control.qmp.job_commands import (
    JOB_ID,
    ON_ERROR,
    Nothing,
    check_active,
    find_served,
    given_speed,
    given_wishes,
    refuse_two,
)
from qedfs.control.qmp.jobs import device_name
from qedfs.control.qmp.state import Call
from qedfs.image.image import Image

commit_commands: Commands[Call] = Commands()


@commit_commands(
    "block-commit",
    Arg("job-id", optional=True),
    Arg("device"),
    Arg("base-node", optional=True),
    Arg("base", optional=True),
    Arg("top-node", optional=True),
    Arg("top", optional=True),
    Arg("backing-file", optional=True),
    Arg("speed", "integer", optional=True),
    Arg("on-error", ON_ERROR, optional=True),
    Arg("filter-node-name", optional=True),
    Arg("auto-finalize", "boolean", optional=True),
    Arg("auto-dismiss", "boolean", optional=True),
)
async def _block_commit(call: Call, arguments: Arguments) -> Nothing:
    refuse_two(arguments, "base", "base-node")
    refuse_two(arguments, "top", "top-node")
    served, image, _ = find_served(call, arguments["device"])
    name = device_name(served)
    _check_base(image, arguments)
    if arguments.get("top-node", name) != name:
        raise QmpError(f"Cannot find device='' nor node-name='{arguments['top-node']}'")
    if arguments.get("top", served.path) != served.path:
        raise QmpError(f"Top image file {arguments['top']} not found")
    if "backing-file" in arguments:
        raise QmpError("'backing-file' specified, but 'top' is the active layer")
    job_id = arguments.get("job-id", name)
    if not JOB_ID.fullmatch(job_id):
        raise QmpError(f"Invalid job ID '{job_id}'")
    if not image.writable:
        raise QmpError("Block node is read-only")
    check_active(served, image)
    jobs = call.control.jobs
    jobs.check_free(image, name)
    if served.jobs is None:
        raise QmpError(f"Device '{name}' cannot be served")
    speed = given_speed(arguments) if "speed" in arguments else 0
    wishes = given_wishes(arguments)
    jobs.check_id(job_id)
    jobs.begin(served.jobs.begin("commit", limit=speed), name, job_id, wishes)
    return {}


def _check_base(image: Image, arguments: Arguments) -> None:
    """There is only one backing. It may be named as the overlay or `query-block` names it."""
    if "base-node" in arguments:  # only images are nodes
        raise QmpError(f"Cannot find device='' nor node-name='{arguments['base-node']}'")
    shown = None if image.source is None else str(image.source.location)
    if "base" in arguments and arguments["base"] not in (image.overlay.backing, shown):
        raise QmpError(f"Can't find '{arguments['base']}' in the backing chain")
