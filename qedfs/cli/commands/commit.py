"""`qedfs commit`: an overlay's own data -> its backing, a local file.

Owns the options, the words of the result, and, if nothing is mounted, the opening of the overlay and the progress bar.
Must not know in which order bytes are written (`image/commit_down.py`), nor how the job of a mounted image is followed
(`cli/image_job.py`).
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import click
import trio

from qedfs.cli.asked_source import Asking, ask
from qedfs.cli.commands.map import whole_map
from qedfs.cli.completion import images, mountpoints
from qedfs.cli.dry_run import looked_at
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.image_job import JobOrder
from qedfs.cli.locked_file import image_explained
from qedfs.cli.option_types import PLACE, RATE
from qedfs.cli.overlay_files import run_changing
from qedfs.cli.ui.copy_progress import CopyProgress, drawn
from qedfs.cli.ui.layout import printable
from qedfs.cli.ui.output import print_json, remark
from qedfs.cli.writable_backing import opened, place_of
from qedfs.errors import InStandby, UsageError
from qedfs.format.record import Pin
from qedfs.format.tables import MISSING
from qedfs.host.procfs import waits_for_disk
from qedfs.image.commit_down import Committed, Pinning, commit_down, copy
from qedfs.image.commit_target import RawTarget, Target
from qedfs.image.pin import pin_for
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.source.samples import Samples
from qedfs.source.url import Location
from qedfs.units import format_size

if TYPE_CHECKING:
    from qedfs.source.retrying import RetryingSource

SILENT_SECONDS = 5.0


@click.command(cls=GivenOnce, short_help="Write an overlay's own data into its backing.")
@click.argument("overlay", metavar="OVERLAY|MOUNTPOINT", type=PLACE, shell_complete=mountpoints)
@click.argument("image", required=False, shell_complete=images)
@click.option("--allow-backing", multiple=True, metavar="PREFIX", help="As for mount: where the backing may be.")
@click.option("--keep", is_flag=True, help="Leave the data in the overlay, too.")
@click.option("--dry-run", is_flag=True, help="Say how much would be written, and write nothing, mounted or not.")
@click.option("--limit", type=RATE, metavar="SIZE", help="Of a mounted IMAGE: at most SIZE bytes per second.")
@click.option("--no-wait", is_flag=True, help="Of a mounted IMAGE: return as soon as it has begun.")
@click.option("--pause", "command", flag_value="pause", help="Of a mounted IMAGE: pause the commit that runs.")
@click.option("--resume", "command", flag_value="resume", help="Let it continue.")
@click.option("--cancel", "command", flag_value="cancel", help="End it. The image reads as before.")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors: no progress bar, no result.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written, or the image's status, as JSON.")
def commit(
    overlay: str,
    image: str | None,
    allow_backing: tuple[str, ...],
    keep: bool,
    dry_run: bool,
    limit: int | None,
    no_wait: bool,
    command: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write what OVERLAY has, and its backing has not, into the backing. Then OVERLAY is empty.

    The backing is a local raw file or QED overlay that nobody else has open. Zeros become holes. A backing that is
    smaller than the image grows. Every other overlay over the same backing becomes useless, and so does every snapshot
    that was made of OVERLAY before: it names that backing.

    OVERLAY is not mounted. With MOUNTPOINT and IMAGE, the overlay of a mounted image is committed while guests use it.
    The stream must be off. What guests write meanwhile stays in the overlay, for another commit.

    If the command is interrupted, the image reads as before, and the same command goes on.
    """
    if image is not None:
        if allow_backing:
            raise UsageError("--allow-backing is for an overlay that is not mounted; a mount has its own")
        if command and keep:
            raise UsageError(f"--{command} goes without --keep")
        if dry_run:
            if limit is not None or no_wait or command:
                raise UsageError("--dry-run goes without --limit, --no-wait, --pause, --resume and --cancel")
            _tell(_of_mounted(overlay, image, quiet), dry_run=True, kept=True, quiet=quiet, as_json=as_json)
            return
        JobOrder(
            overlay,
            image,
            "commit",
            stays="the image reads as before",
            ended="the backing has its data" + (", and so has the overlay" if keep else ""),
            limit=limit,
            command=command,
            no_wait=no_wait,
            quiet=quiet,
            as_json=as_json,
            arguments={"keep": keep},
        ).carry_out()
        return
    if limit is not None or no_wait or command:
        raise UsageError("--limit, --no-wait, --pause, --resume and --cancel are for a mounted image: MOUNTPOINT IMAGE")
    progress = CopyProgress(os.path.basename(overlay))
    order = _Order(overlay, allow_backing, keep, dry_run)
    done, backing = run_changing(_with_bar, order, progress, quiet)
    found = _Found(overlay, overlay, backing, done)
    _tell(found, dry_run=dry_run, kept=keep or dry_run, quiet=quiet, as_json=as_json)


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """What was done, or would be. `name`: of the overlay or image, for people."""

    name: str
    overlay: str
    backing: str
    done: Committed


def _of_mounted(mountpoint: str, image: str, quiet: bool) -> _Found:
    """A dry run of a mounted image."""
    found, parts = looked_at(mountpoint, image, "commit", quiet=quiet)
    data, zeros, written = (sum(part[key] for part in parts) for key in ("data", "zeros", "written"))
    done = Committed(data, zeros, written, max(part["grown"] for part in parts))
    return _Found(found["name"], found["overlay"], found["backing"], done)


def _tell(found: _Found, *, dry_run: bool, kept: bool, quiet: bool, as_json: bool) -> None:
    """Print the result."""
    if as_json:
        print_json(
            {
                "overlay": os.path.abspath(found.overlay),
                "backing": found.backing,
                **dataclasses.asdict(found.done),
                "kept": kept,
                "dry_run": dry_run,
            }
        )
    elif not quiet:
        click.echo(printable(_words(found, dry_run=dry_run, kept=kept)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Order:
    """What the user wants."""

    path: str
    allow_backing: tuple[str, ...]
    keep: bool
    dry_run: bool


def _words(found: _Found, *, dry_run: bool, kept: bool) -> str:
    done = found.done
    has = f"{format_size(done.data)} of data and {format_size(done.zeros)} of zeros"
    if dry_run:
        grows = f", which would grow by {format_size(done.grown)}" if done.grown else ""
        return f"{found.name}: has {has}; {format_size(done.written)} differ from {found.backing}{grows}"
    what = "still has its data" if kept else "is empty now"
    return f"{found.backing}: got {format_size(done.written)}, of {has}; {found.name} {what}"


async def _with_bar(order: _Order, progress: CopyProgress, quiet: bool) -> tuple[Committed, str]:
    """Returns what was done, and the path of the backing."""
    async with drawn(progress, quiet=quiet), trio.open_nursery() as nursery:
        if not quiet:
            nursery.start_soon(_tell_of_silence, order.path, progress)
        done = await _carried_out(order, progress)
        nursery.cancel_scope.cancel()
    return done


async def _tell_of_silence(path: str, progress: CopyProgress) -> None:
    """Say once if it goes no further because of a disk. Not even Ctrl-C ends such a wait."""
    done = -1
    while not (progress.done == done and waits_for_disk(os.getpid())):
        done = progress.done
        await trio.sleep(SILENT_SECONDS)
    remark(f"{path}: the commit waits for a disk, or for a file system that is frozen, and can end only after that")


async def _carried_out(order: _Order, progress: CopyProgress) -> tuple[Committed, str]:
    """See `_with_bar`."""
    with image_explained(order.path):
        overlay = await open_overlay(order.path, writable=not order.dry_run)
    mine = True  # to close
    try:
        location = _location(order, overlay)
        runs = [run async for run in whole_map(overlay)]
        progress.total = sum(run.size for run in runs if run.offset != MISSING)
        asking = Asking(order.allow_backing)
        async with opened(overlay, location, asking, dry=order.dry_run) as target:
            if order.dry_run:
                done = Committed()
                await copy(overlay, runs, target, progress.add, done)
            else:
                pinning = _pinning(overlay, location, asking, target)
                mine = False
                done = await commit_down(overlay, runs, target, pinning, progress.add, keep=order.keep)
        return done, location.path or ""
    finally:
        if order.dry_run:
            overlay.close_now()
        elif mine:
            with trio.CancelScope(shield=True):
                await overlay.close()


def _location(order: _Order, overlay: Overlay) -> Location:
    if overlay.backing is None:
        raise UsageError(f"{order.path}: is complete, and has no backing")
    if overlay.record.standby.waits:
        raise InStandby(f"{order.path}: is in standby, and has no data; qedfs activate ends that")
    return place_of(order.path, overlay.backing)


def _pinning(overlay: Overlay, location: Location, asking: Asking, target: Target) -> Pinning | None:
    """How the pin follows the backing. A mount does not read a QED image with a backing, so nothing is pinned there."""
    if not target.pinned:
        return None
    raw = isinstance(target, RawTarget)

    async def renewed(samples: str) -> Pin:
        async def told(remote: RetryingSource, _: trio.Nursery) -> Pin:
            identity = await remote.connect()
            return pin_for(overlay.backing or "", remote, identity, Samples.decode(samples))

        return await ask(location, asking, told, raw=raw)

    return Pinning(renewed)
