"""`qedfs export`: an image -> a raw or qcow2 file, or a pipe.

Owns the options, and where the bytes go: into a new file, into a pipe, or into a raw file of which qemu-img makes
another. Must not know how they are read and copied (`cli/exporting/`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from typing import BinaryIO

import click
import trio

from qedfs.cli.completion import files, images
from qedfs.cli.credentials_option import credentials as read
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.digest_option import ExpectedDigest
from qedfs.cli.exit_status import cause_of
from qedfs.cli.exporting.mount_export import mounted_image
from qedfs.cli.exporting.overlay_export import Asking, Export, export_overlay
from qedfs.cli.exporting.qcow2_file import convert, qemu_img
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.new_file import new_file
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.pin_options import pin_options
from qedfs.cli.ui.copy_progress import CopyProgress, drawn
from qedfs.cli.ui.output import print_json
from qedfs.errors import UsageError
from qedfs.source.pinning import By, Pinning
from qedfs.units import format_size

RAW, QCOW2 = "raw", "qcow2"

Written = dict[str, int]
Write = Callable[[BinaryIO | None], Awaitable[Written]]  # to a new file, or to standard output


@click.command(cls=GivenOnce, short_help="Write an image to a raw or qcow2 file.")
@click.argument("overlay", type=PLACE, metavar="OVERLAY|MOUNTPOINT", shell_complete=files)
@click.argument("image", nargs=-1, metavar="[IMAGE]", shell_complete=images)
@click.argument("file", type=PLACE, shell_complete=files)
@click.option("--format", "file_format", type=click.Choice([RAW, QCOW2]), default=RAW, help="Of FILE. Default: raw.")
@click.option("--with-backing", is_flag=True, help="Fetch what is missing. Default: refuse an incomplete overlay.")
@click.option("--allow-backing", multiple=True, metavar="PREFIX", help="As for mount: where the backing may be.")
@click.option("--source-timeout", type=DURATION, default="30s", show_default=True, help="As for mount.")
@pin_options
@credentials_option
@click.option("--verify", metavar="DIGEST", help="Fail unless the image has this digest, such as sha256:9f86d0...")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors: no progress bar, no result.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    overlay: str,
    image: tuple[str, ...],
    file: str,
    file_format: str,
    with_backing: bool,
    allow_backing: tuple[str, ...],
    source_timeout: float,
    pin: str,
    identity: str | None,
    credentials: str | None,
    verify: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the image of OVERLAY to the raw file FILE, or to a pipe if FILE is -.

    Zeros become holes. If the file system can share blocks (XFS, btrfs), the data takes no additional space. FILE
    appears only when it is complete, and with --verify only if the image has that digest. Into a pipe zeros are
    written, and a wrong digest is known at the end: then the exit code is 1.

    OVERLAY must not be mounted. Of a mounted one, name MOUNTPOINT and IMAGE: that is exported as it is at a moment
    between two writes, by a qedfs snapshot. Where the file system cannot share blocks, the image is read through the
    mount; if anybody writes to it meanwhile, this fails.

    With --format qcow2, qemu-img makes FILE of that raw file, which needs its space beside FILE until then.
    """
    if len(image) > 1:
        raise UsageError(f"{' '.join(image)}: name one image of the mount, then the file")
    progress = CopyProgress(os.path.basename(overlay if file == "-" else file))
    asking = Asking(allow_backing, read(credentials), source_timeout, Pinning(By(pin), identity), with_backing)
    job = Export(overlay, overlay, asking, progress, None if verify is None else ExpectedDigest(verify))
    if file == "-":
        _check_pipe(file_format, as_json=as_json)
        with _source(job, image) as (write, _):
            _to_pipe(write, progress, quiet=quiet)
        return
    program = qemu_img() if file_format == QCOW2 else None
    if os.path.exists(file) and not os.path.isfile(file):
        raise UsageError(f"{file}: is not a regular file; to write elsewhere, use - and a pipe")
    if os.path.lexists(file) and not force:
        raise UsageError(f"{file}: exists already; --force replaces it")
    with _source(job, image) as (write, source), new_file(file) as target:
        if program is None:
            written = _run(functools.partial(write, target), progress, quiet=quiet)
        else:
            # Beside the file: there it can share blocks with the overlay, and a tmpfs may be too small.
            with tempfile.TemporaryFile(prefix=".qedfs-", dir=os.path.dirname(os.path.abspath(file))) as raw:
                both = functools.partial(_to_qcow2, write, raw, target, file, program, progress)
                written = _run(both, progress, quiet=quiet)
    if as_json:
        print_json({**source, "file": os.path.abspath(file), "format": file_format, **written})
    elif not quiet:
        click.echo(f"{file}: {format_size(written['size'])}, {format_size(written['data_size'])} of it data")


@contextlib.contextmanager
def _source(job: Export, image: tuple[str, ...]) -> Iterator[tuple[Write, dict[str, str]]]:
    """What writes the image, and what is printed of where it is from."""
    if not image:
        yield functools.partial(export_overlay, job), {"overlay": os.path.abspath(job.path), "read_from": "overlay"}
        return
    with mounted_image(job.path, image[0], job) as found:
        yield found.write, {"overlay": found.overlay, "read_from": found.read_from}


def _check_pipe(file_format: str, *, as_json: bool) -> None:
    if file_format != RAW:
        raise UsageError(f"{file_format} is not written in the order of its bytes, as a pipe needs it; name a FILE")
    if as_json:
        raise UsageError("standard output gets the image, so that there is no place for --json")
    if os.isatty(sys.stdout.fileno()):
        raise UsageError("standard output is a terminal; name a FILE, or pipe it to another command")


def _to_pipe(write: Write, progress: CopyProgress, *, quiet: bool) -> None:
    try:
        _run(functools.partial(write, None), progress, quiet=quiet)
    except ExceptionGroup as exc:
        if isinstance(cause_of(exc), BrokenPipeError):
            raise BrokenPipeError from exc  # the reader has had enough
        raise


async def _to_qcow2(
    write: Write, raw: BinaryIO, target: BinaryIO, file: str, program: str, progress: CopyProgress
) -> Written:
    progress.passes = 2
    written = await write(raw)
    raw.flush()
    await convert(program, raw.fileno(), target.fileno(), file, progress)
    return written


def _run(copy: Callable[[], Awaitable[Written]], progress: CopyProgress, *, quiet: bool) -> Written:
    async def run() -> Written:
        async with drawn(progress, quiet=quiet):
            return await copy()

    return trio.run(run)
