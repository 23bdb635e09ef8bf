"""The commands `x-qedfs-*`, for what QMP lacks. They name an image rather than a job.

Owns their arguments and results. Must not know how the work is done: a handler calls the mount (`control/port.py`), an
image or a job.

- `x-qedfs-status`: what `qedfs status --json` prints.
- `x-qedfs-start {device, limit?, type?, keep?}`: stream, or run a job of another type; waits while the source is
  unreachable or the disk is full. `keep`: the overlay keeps what a job of the type `commit` writes into its backing.
- `x-qedfs-dry-run {device, type, offset?}`: what a job of the type `commit` would write, of the image from `offset` on;
  changes nothing. Returns `{data, zeros, written, grown, next}`: bytes of data and of zeros that the overlay has, those
  that differ from the backing, by how many the backing would grow, and where to go on, or null. An error says what
  would keep the job from beginning. Of the type `defrag`, of the whole image, `{data, pieces, longest_piece, to_move,
  next}`: bytes of data, in how many pieces they are, and how many of them are not in order.
- `x-qedfs-pause`, `x-qedfs-resume`, `x-qedfs-cancel {device, type?}`: repeating one is not an error. `type`: of a job
  beside the stream, which must be active.
- `x-qedfs-limit {device, limit, type?}`: bytes per second, 0 for no limit; works even while nothing streams.
- `x-qedfs-limit-total {limit}`: the same for all images together, for what they fetch in the background.
- `x-qedfs-step {device, offset?}`: populate the next missing run at or after `offset` with one request; returns
  `{pos, size, next}`: the range that was populated, and the next missing byte (null if there is none).
- `x-qedfs-next-missing {device, offset?}`: returns `{offset}` of the next byte that needs the source, or null.
- `x-qedfs-profile {device}`: returns `{ranges}`, a list of [pos, size] that readers had to wait for, in that order.
- `x-qedfs-ready {device}`: whether `blockdev-set-active` would activate an image in standby now. An error says why not.
- `x-qedfs-missing {device, offset?}`: returns `{ranges, next}`: up to 1024 ranges [pos, size] that need the source, and
  where to go on, or null.
- `x-qedfs-populate {device, from, format?, force?}`: begin to populate what is missing from another copy, a file or a
  URL. `populate` of the status tells how far it is. `x-qedfs-populate-cancel {device}` ends it.
- `x-qedfs-source-set {device, url, force?}`: another address of the same source, from now on. It is compared first. The
  overlay names it from then on.
- `x-qedfs-on-source-error {device, action, bound?}`: what reads do while the source is away: `eio` or `wait`, the
  latter for at most `bound` seconds. The overlay records it.
- `x-qedfs-release {device, undo?}`: let a complete image leave the mount once nobody has it open, so that others can
  open its overlay; returns `{released}`: whether that is done. If not, the event `X_QEDFS_RELEASED` comes when it is.
  `undo`: serve it on, or again.
- `x-qedfs-snapshot {device, file}`: copy the overlay, as it is at one moment, to the absolute path `file`; returns
  `{file, pause_seconds}`: how long writes have waited.
- `x-qedfs-rescan`: scan the folder for new and removed overlays.
- `x-qedfs-upgrade`: let another server of the installed version take the mount over; returns when that is ready. The
  connection ends a moment later.

Their errors also have `x-qedfs-exit-code`: the exit status of the command line for this error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qedfs.control.monitoring.status import mount_status
from qedfs.control.port import ServedImage
from qedfs.control.qmp.block_job import Status, Wishes
from qedfs.control.qmp.command import Arg, Arguments, Commands
from qedfs.control.qmp.errors import DeviceNotActive, QmpError
from qedfs.control.qmp.job_commands import Nothing, begin_stream, check_active, find_served
from qedfs.control.qmp.jobs import SUFFIX, device_name
from qedfs.control.qmp.state import Call
from qedfs.errors import InStandby, ReadOnlyOverlay
from qedfs.image import commit_look
from qedfs.image.image import Image
from qedfs.image.source_errors import MOST_BOUND_SECONDS, OnSourceError
from qedfs.image.source_rule import set_source_errors
from qedfs.jobs.commit import CommitJob
from qedfs.jobs.defrag import DefragJob, disorder
from qedfs.jobs.job import Job
from qedfs.jobs.kinds import KINDS
from qedfs.jobs.missing import MissingRuns

our_commands: Commands[Call] = Commands()

MOST_RANGES = 1024  # in one answer of x-qedfs-missing


@our_commands("x-qedfs-status")
async def _status(call: Call, _: Arguments) -> dict[str, Any]:
    control = call.control
    return mount_status(control.mount, control.socket, control.rates)


@our_commands(
    "x-qedfs-start",
    Arg("device"),
    Arg("limit", "integer", optional=True),
    Arg("type", "string", optional=True),
    Arg("keep", "boolean", optional=True),
)
async def _start(call: Call, arguments: Arguments) -> Nothing:
    served, image, stream = find_served(call, arguments["device"])
    limit = _not_negative(arguments, "limit") if "limit" in arguments else None
    check_active(served, image)
    if (kind := arguments.get("type", stream.kind)) != stream.kind:
        _start_other(call, served, image, kind, limit or 0, keep=arguments.get("keep", False))
        return {}
    if image.complete:
        return {}
    _check_writable(served, image)
    jobs = call.control.jobs
    if jobs.active(stream) is None:
        job_id = jobs.free_id(device_name(served))
        jobs.begin(stream, device_name(served), job_id, Wishes())
    await begin_stream(stream, limit)
    return {}


def _start_other(call: Call, served: ServedImage, image: Image, kind: str, limit: int, *, keep: bool) -> None:
    """Begin a job of another kind than the stream, which every image has. `keep`: of a commit, see `CommitJob`."""
    jobs, name = call.control.jobs, device_name(served)
    if served.jobs is None or kind not in KINDS:
        raise QmpError(f"Parameter 'type' does not accept value '{kind}'")
    _check_writable(served, image)
    jobs.check_free(image, name)
    job = served.jobs.begin(kind, limit=limit)
    if isinstance(job, CommitJob):
        job.keep = keep
    jobs.begin(job, name, jobs.free_id(name), Wishes())


@our_commands(
    "x-qedfs-dry-run", Arg("device"), Arg("type", ("commit", "defrag")), Arg("offset", "integer", optional=True)
)
async def _dry_run(call: Call, arguments: Arguments) -> dict[str, Any]:
    served, image, _ = find_served(call, arguments["device"])
    pos = _not_negative(arguments, "offset")
    check_active(served, image)
    _check_writable(served, image)
    call.control.jobs.check_free(image, device_name(served))
    if served.jobs is not None:
        served.jobs.check_free(arguments["type"])
    if arguments["type"] == DefragJob.kind:
        return {**dataclasses.asdict(await disorder(image.overlay)), "next": None}
    found, following = await commit_look.look(image, pos)
    return {**dataclasses.asdict(found), "next": following}


_TYPE = Arg("type", "string", optional=True)


def _find_job(call: Call, arguments: Arguments) -> Job:
    """The job that a command means: the stream, or the active job of another `type`."""
    served, _, stream = find_served(call, arguments["device"])
    kind = arguments.get("type", stream.kind)
    if kind == stream.kind:
        return stream
    job = None if served.jobs is None else served.jobs.other
    if job is None or job.kind != kind or not job.active:
        raise DeviceNotActive(f"{served.name}: has no {kind} at work")
    return job


@our_commands("x-qedfs-pause", Arg("device"), _TYPE)
async def _pause(call: Call, arguments: Arguments) -> Nothing:
    job = _find_job(call, arguments)
    if not job.done and not job.paused:
        await job.pause()
    return {}


@our_commands("x-qedfs-resume", Arg("device"), _TYPE)
async def _resume(call: Call, arguments: Arguments) -> Nothing:
    job = _find_job(call, arguments)
    if not job.done:
        await job.resume()
    return {}


@our_commands("x-qedfs-cancel", Arg("device"), _TYPE)
async def _cancel(call: Call, arguments: Arguments) -> Nothing:
    block = call.control.jobs.active(_find_job(call, arguments))
    if block is not None and block.status is not Status.ABORTING:
        call.control.jobs.cancel(block)
    return {}


@our_commands("x-qedfs-limit", Arg("device"), Arg("limit", "integer"), _TYPE)
async def _limit(call: Call, arguments: Arguments) -> Nothing:
    _find_job(call, arguments).set_limit(_not_negative(arguments, "limit"))
    return {}


@our_commands("x-qedfs-limit-total", Arg("limit", "integer"))
async def _limit_total(call: Call, arguments: Arguments) -> Nothing:
    call.control.mount.total.limiter.limit = _not_negative(arguments, "limit")
    return {}


@our_commands("x-qedfs-step", Arg("device"), Arg("offset", "integer", optional=True))
async def _step(call: Call, arguments: Arguments) -> dict[str, Any]:
    served, image, stream = find_served(call, arguments["device"])
    check_active(served, image)
    _check_writable(served, image)
    pos, size, following = await stream.step(_not_negative(arguments, "offset"))
    return {"pos": pos, "size": size, "next": following}


@our_commands("x-qedfs-next-missing", Arg("device"), Arg("offset", "integer", optional=True))
async def _next_missing(call: Call, arguments: Arguments) -> dict[str, Any]:
    _, _, stream = find_served(call, arguments["device"])
    return {"offset": await stream.next_missing(_not_negative(arguments, "offset"))}


@our_commands("x-qedfs-profile", Arg("device"))
async def _profile(call: Call, arguments: Arguments) -> dict[str, Any]:
    _, image, _ = find_served(call, arguments["device"])
    return {"ranges": image.waits.ranges}


@our_commands("x-qedfs-ready", Arg("device"))
async def _ready(call: Call, arguments: Arguments) -> Nothing:
    served, _, _ = find_served(call, arguments["device"])
    await call.control.mount.activate(served, dry=True)
    return {}


@our_commands("x-qedfs-missing", Arg("device"), Arg("offset", "integer", optional=True))
async def _missing(call: Call, arguments: Arguments) -> dict[str, Any]:
    _, image, _ = find_served(call, arguments["device"])
    ranges, following = await MissingRuns(image).ranges_from(_not_negative(arguments, "offset"), MOST_RANGES)
    return {"ranges": ranges, "next": following}


@our_commands(
    "x-qedfs-populate",
    Arg("device"),
    Arg("from"),
    Arg("format", ("raw", "qcow2", "qed"), optional=True),
    Arg("force", "boolean", optional=True),
)
async def _populate(call: Call, arguments: Arguments) -> Nothing:
    served, image, _ = find_served(call, arguments["device"])
    if image.in_standby:
        raise InStandby(f"{served.name}: is in standby, and keeps nothing; qedfs activate ends that")
    _check_writable(served, image)
    if not image.complete:
        await call.control.mount.populate(
            served,
            arguments["from"],
            backing_format=arguments.get("format"),
            force=arguments.get("force", False),
        )
    return {}


@our_commands("x-qedfs-populate-cancel", Arg("device"))
async def _populate_cancel(call: Call, arguments: Arguments) -> Nothing:
    served, _, _ = find_served(call, arguments["device"])
    if served.jobs is not None and served.jobs.populate is not None:
        served.jobs.populate.cancel()
    return {}


@our_commands("x-qedfs-source-set", Arg("device"), Arg("url"), Arg("force", "boolean", optional=True))
async def _source_set(call: Call, arguments: Arguments) -> Nothing:
    served, _, _ = find_served(call, arguments["device"])
    await call.control.mount.move_source(served, arguments["url"], force=arguments.get("force", False))
    return {}


@our_commands(
    "x-qedfs-on-source-error", Arg("device"), Arg("action", ("eio", "wait")), Arg("bound", "integer", optional=True)
)
async def _on_source_error(call: Call, arguments: Arguments) -> Nothing:
    _, image, _ = find_served(call, arguments["device"])
    wait, bound = arguments["action"] == "wait", arguments.get("bound")
    if bound is not None and not (wait and 0 < bound <= MOST_BOUND_SECONDS):
        raise QmpError("Parameter 'bound' expects seconds, with the action 'wait'")
    await set_source_errors(image, OnSourceError(wait=wait, bound_seconds=bound))
    return {}


@our_commands("x-qedfs-release", Arg("device"), Arg("undo", "boolean", optional=True))
async def _release(call: Call, arguments: Arguments) -> dict[str, bool]:
    mount, device = call.control.mount, arguments["device"]
    name = device.removesuffix(SUFFIX) + SUFFIX
    if arguments.get("undo", False):
        if not await mount.take_back(name):
            find_served(call, device)  # an image that stays anyway is no error
        return {"released": False}
    if name in mount.released():
        return {"released": True}
    served, _, _ = find_served(call, device)
    done = await mount.release(served)
    call.control.jobs.sync()
    call.control.releases.sync(mount.released())
    return {"released": done}


@our_commands("x-qedfs-snapshot", Arg("device"), Arg("file"))
async def _snapshot(call: Call, arguments: Arguments) -> dict[str, Any]:
    served, _, _ = find_served(call, arguments["device"])
    done = await call.control.mount.snapshot(served, arguments["file"])
    return {"file": done.file, "pause_seconds": round(done.pause_seconds, 4)}


@our_commands("x-qedfs-rescan")
async def _rescan(call: Call, _: Arguments) -> Nothing:
    await call.control.mount.rescan()
    return {}


@our_commands("x-qedfs-upgrade")
async def _upgrade(call: Call, _: Arguments) -> Nothing:
    await call.control.mount.upgrade()
    return {}


def _check_writable(served: ServedImage, image: Image) -> None:
    if not image.writable:
        raise ReadOnlyOverlay(f"{served.name}: the overlay is read-only, nothing that is fetched could be kept")


def _not_negative(arguments: Arguments, name: str) -> int:
    value: int = arguments.get(name, 0)
    if value < 0:
        raise QmpError(f"Parameter '{name}' expects a non-negative value")
    return value
