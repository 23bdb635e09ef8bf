"""`qedfs defrag`: lays the data of an overlay, in a file or mounted, out in the order of its image.

Owns the options, the words of the result, and the run of the job on an overlay that is not mounted. Must not know what
is moved where (`jobs/defrag.py`), nor how the job of a mounted image is followed (`cli/image_job.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import os

import click
import trio

from qedfs.cli.completion import images, mountpoints
from qedfs.cli.dry_run import looked_at
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.image_job import JobOrder
from qedfs.cli.locked_file import image_explained
from qedfs.cli.option_types import PLACE, RATE
from qedfs.cli.overlay_files import peeked, run_changing
from qedfs.cli.ui.copy_progress import CopyProgress, drawn
from qedfs.cli.ui.layout import printable
from qedfs.cli.ui.output import print_json
from qedfs.errors import QedfsError, UsageError
from qedfs.image.image import Image
from qedfs.jobs.defrag import DefragJob, disorder
from qedfs.jobs.job import Action, Driver, Job
from qedfs.overlay.open import open_overlay
from qedfs.units import format_size

LOOK_SECONDS = 0.2


@click.command(cls=GivenOnce, short_help="Lay an overlay out in the order of its image.")
@click.argument("overlay", metavar="OVERLAY|MOUNTPOINT", type=PLACE, shell_complete=mountpoints)
@click.argument("image", required=False, shell_complete=images)
@click.option("--dry-run", is_flag=True, help="Say in how many pieces it is, and move nothing.")
@click.option("--limit", type=RATE, metavar="SIZE", help="At most SIZE bytes per second, 0 for no limit.")
@click.option("--no-wait", is_flag=True, help="Of a mounted IMAGE: return as soon as it has begun.")
@click.option("--pause", "command", flag_value="pause", help="Of a mounted IMAGE: pause the one that runs.")
@click.option("--resume", "command", flag_value="resume", help="Let it continue.")
@click.option("--cancel", "command", flag_value="cancel", help="End it. What is in order stays so.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress and no result, only errors.")
@click.option("--json", "as_json", is_flag=True, help="Print what was moved, or the image's status, as JSON.")
def defrag(
    overlay: str,
    image: str | None,
    dry_run: bool,
    limit: int | None,
    no_wait: bool,
    command: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Lay the data of OVERLAY out in the order of the image.

    After that, reading the image from start to end reads the overlay's file from start to end. qedfs info shows in how
    many pieces an overlay is. Needs 128 MiB of free space, and uses more if there is much.

    OVERLAY is not mounted. If the command is interrupted, what is in order stays so, and the same command goes on.

    With MOUNTPOINT and IMAGE, the overlay of a mounted image is laid out while guests use it. The stream must have
    ended, or be off. With --limit and a job that runs, its limit changes. Ctrl-C ends it. If another server takes the
    mount over, it begins anew, but not with --no-wait.
    """
    if image is None:
        if no_wait or command:
            raise UsageError("--no-wait, --pause, --resume and --cancel are for a mounted image: MOUNTPOINT IMAGE")
        done = trio.run(_look, overlay) if dry_run else run_changing(_in_file, overlay, limit or 0, quiet)
        _tell(overlay, overlay, done, dry_run=dry_run, quiet=quiet, as_json=as_json)
        return
    if dry_run:
        if limit is not None or no_wait or command:
            raise UsageError("--dry-run goes without --limit, --no-wait, --pause, --resume and --cancel")
        found, (part,) = looked_at(overlay, image, "defrag", quiet=quiet)
        done = _Done(part["data"], part["pieces"], part["pieces"], part["longest_piece"], part["to_move"])
        _tell(found["name"], found["overlay"], done, dry_run=True, quiet=quiet, as_json=as_json)
        return
    JobOrder(
        overlay,
        image,
        "defrag",
        stays="what is in order stays so",
        ended="in order",
        limit=limit,
        command=command,
        no_wait=no_wait,
        quiet=quiet,
        as_json=as_json,
    ).carry_out()


@dataclasses.dataclass(frozen=True, slots=True)
class _Done:
    """What was found and done, in bytes and pieces. `to_move`: see `Disorder`."""

    data: int
    pieces_before: int
    pieces: int
    longest_piece: int
    to_move: int
    moved: int = 0


def _tell(name: str, overlay: str, done: _Done, *, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Print the result. `name`: of the overlay or image, for people."""
    if as_json:
        print_json({"overlay": os.path.abspath(overlay), "dry_run": dry_run, **dataclasses.asdict(done)})
    elif not quiet:
        click.echo(printable(_words(name, done, dry_run=dry_run)))


def _words(name: str, done: _Done, *, dry_run: bool) -> str:
    has = f"{name}: {format_size(done.data)} of data in {_pieces(done.pieces)}"
    if dry_run:
        return f"{has}, the longest {format_size(done.longest_piece)}; {format_size(done.to_move)} not in order"
    return f"{has}, before in {_pieces(done.pieces_before)}; moved {format_size(done.moved)}"


def _pieces(count: int) -> str:
    return f"{count} piece{'s' if count != 1 else ''}"


class _Stopping(Driver):
    """Ends the job with its first error: nobody would see for what it waits."""

    def judge(self, job: Job, error: QedfsError) -> Action:
        return Action.STOP


async def _look(path: str) -> _Done:
    async with peeked(path) as overlay:
        found = await disorder(overlay)
    return _Done(found.data, found.pieces, found.pieces, found.longest_piece, found.to_move)


async def _in_file(path: str, limit: int, quiet: bool) -> _Done:
    """The job of a mounted image, without a mount and without guests. It never reads what is missing."""
    # The command itself prints why it has failed. Of the job's log, only the traceback of a bug is more.
    logging.getLogger(Job.__module__).addFilter(lambda record: record.exc_info is not None)
    with image_explained(path):
        overlay = await open_overlay(path, writable=True)
    try:
        before = await overlay.fragments()
        job = DefragJob(Image(os.path.basename(path), overlay, None), limit=limit, driver=_Stopping())
        progress = CopyProgress(os.path.basename(path))
        progress.total = job.total
        async with drawn(progress, quiet=quiet), trio.open_nursery() as nursery:
            nursery.start_soon(_follow, job, progress)
            await job.run(once=True)
            nursery.cancel_scope.cancel()
        if job.error is not None:
            raise job.error.fresh()
        after = await disorder(overlay)
        return _Done(after.data, before.pieces, after.pieces, after.longest_piece, after.to_move, job.moved_bytes)
    finally:
        with trio.CancelScope(shield=True):
            await overlay.close()


async def _follow(job: DefragJob, progress: CopyProgress) -> None:
    while True:
        progress.done = job.progress
        await trio.sleep(LOOK_SECONDS)
