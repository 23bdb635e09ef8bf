"""`qedfs export`: an overlay -> a raw file, or a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, BinaryIO

import click
import trio

from qedfs.cli.commands.map import whole_map
from qedfs.cli.credentials_option import credentials as read
from qedfs.cli.credentials_option import credentials_option
from qedfs.cli.digest_option import READ_BYTES, ExpectedDigest
from qedfs.cli.exit_status import cause_of
from qedfs.cli.given_once import GivenOnce
from qedfs.cli.image_pipe import write_all, write_in_order
from qedfs.cli.new_file import new_file
from qedfs.cli.option_types import DURATION, PLACE
from qedfs.cli.overlay_files import image_explained
from qedfs.cli.pin_options import pin_options
from qedfs.cli.ui.copy_progress import CopyProgress, drawn
from qedfs.cli.ui.output import print_json
from qedfs.errors import InStandby, QedfsError, UsageError
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.storage import Buffer
from qedfs.source.credentials import Credentials
from qedfs.source.pinning import By, Pinning
from qedfs.units import format_size

if TYPE_CHECKING:
    from qedfs.image.image import Image

COPY_BYTES = 8 << 20
FETCH_BYTES = 1 << 20
FETCHES = 8  # concurrent reads of the backing
HOLE_BYTES = 64 << 10  # zeros of this size become a hole
ZEROS = bytes(HOLE_BYTES)


@click.command(cls=GivenOnce, short_help="Write an image to a raw file.")
@click.argument("overlay", type=PLACE)
@click.argument("file", type=PLACE)
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
    file: str,
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
    """Write the image of OVERLAY, which must not be mounted, to the raw file FILE, or to a pipe if FILE is -.

    Zeros become holes. If the file system can share blocks (XFS, btrfs), the data takes no additional space. FILE
    appears only when it is complete, and with --verify only if it has that digest. Into a pipe zeros are written, and a
    wrong digest is known at the end: then the exit code is 1.

    Of an image that is mounted, take a qedfs snapshot and export that.
    """
    expected = None if verify is None else ExpectedDigest(verify)
    asking = _Asking(allow_backing, read(credentials), source_timeout, Pinning(By(pin), identity), with_backing)
    if file == "-":
        if as_json:
            raise UsageError("standard output gets the image, so that there is no place for --json")
        if os.isatty(sys.stdout.fileno()):
            raise UsageError("standard output is a terminal; name a FILE, or pipe it to another command")
        progress = CopyProgress(os.path.basename(overlay))
        try:
            trio.run(_with_bar, _Export(overlay, asking, progress, expected), None, quiet)
        except ExceptionGroup as exc:
            if isinstance(cause_of(exc), BrokenPipeError):
                raise BrokenPipeError from exc  # the reader has had enough
            raise
        return
    if os.path.exists(file) and not os.path.isfile(file):
        raise UsageError(f"{file}: is not a regular file; to write elsewhere, use - and a pipe")
    if os.path.lexists(file) and not force:
        raise UsageError(f"{file}: exists already; --force replaces it")
    progress = CopyProgress(os.path.basename(file))
    with new_file(file) as target:
        written = trio.run(_with_bar, _Export(overlay, asking, progress, expected), target, quiet)
    if as_json:
        print_json({"overlay": os.path.abspath(overlay), "file": os.path.abspath(file), **written})
    elif not quiet:
        click.echo(f"{file}: {format_size(written['size'])}, {format_size(written['data_size'])} of it data")


@dataclasses.dataclass(frozen=True, slots=True)
class _Asking:
    """How the backing may be read."""

    allow_backing: tuple[str, ...]
    credentials: Credentials
    timeout_seconds: float
    pinning: Pinning
    with_backing: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Export:
    """What is written, and how."""

    path: str
    asking: _Asking
    progress: CopyProgress
    expected: ExpectedDigest | None


async def _with_bar(export: _Export, target: BinaryIO | None, quiet: bool) -> dict[str, int]:
    """Write to `target`, or to standard output."""
    async with drawn(export.progress, quiet=quiet):
        with image_explained(export.path):
            overlay = await open_overlay(export.path, writable=False)
        try:
            data, missing = await _runs(overlay, export)
            if target is None:
                await _pipe(overlay, export, fetched=bool(missing))
                written = 0
            else:
                written = await _export(overlay, export, data, missing, target)
            # After all reads: if somebody has truncated the overlay meanwhile, we have read zeros past its end.
            await overlay.inspect()
            if export.expected is not None:
                if target is not None:
                    await trio.to_thread.run_sync(_read_back, target, overlay.image_size, export.expected)
                export.expected.check(export.path)
            return {"size": overlay.image_size, "data_size": written}
        finally:
            overlay.close_now()


async def _runs(overlay: Overlay, export: _Export) -> tuple[list[Run], list[Run]]:
    """The runs of data, and those that have to be fetched. Raises QedfsError if that is not wanted."""
    path = export.path
    if export.asking.with_backing and overlay.record.standby.waits:
        raise InStandby(f"{path}: is in standby: its backing may still change while it is read; activate it first")
    runs = [run async for run in whole_map(overlay)]
    missing = [run for run in runs if run.offset == MISSING] if overlay.backing is not None else []
    if missing and not export.asking.with_backing:
        size = format_size(sum(run.size for run in missing))
        raise QedfsError(f"{path}: {size} is still missing; mount it until it is complete, or use --with-backing")
    return [run for run in runs if run.offset > ZERO], missing


async def _export(overlay: Overlay, export: _Export, data: list[Run], missing: list[Run], target: BinaryIO) -> int:
    """Write to a file. Returns how many bytes of it are data."""
    target.truncate(overlay.image_size)
    export.progress.total = sum(run.size for run in [*data, *missing])
    with _opened_again(export.path, overlay) as source:
        for run in data:
            await trio.to_thread.run_sync(_copy, source, run, target, export.progress)
    fetched = await _fetch(overlay, export, missing, target) if missing else 0
    return sum(run.size for run in data) + fetched


async def _pipe(overlay: Overlay, export: _Export, *, fetched: bool) -> None:
    """Write to standard output, all bytes in their order."""
    from qedfs.image.image import Image

    export.progress.total = overlay.image_size

    def write(piece: bytes) -> None:
        if export.expected is not None:
            export.expected.add(piece)
        write_all(sys.stdout.fileno(), piece)
        export.progress.add(len(piece))

    if not fetched:
        await write_in_order(Image(export.path, overlay, None).read, overlay.image_size, write)
        return
    async with _over_backing(overlay, export) as image:
        await write_in_order(image.read, overlay.image_size, write)


def _read_back(target: BinaryIO, size: int, expected: ExpectedDigest) -> None:
    """Hash what was written, most of which is in the page cache."""
    target.flush()
    pos = 0
    while pos < size:
        piece = os.pread(target.fileno(), READ_BYTES, pos)
        if not piece:
            raise QedfsError("the file that was written has become shorter")
        expected.add(piece)
        pos += len(piece)


@contextlib.contextmanager
def _opened_again(path: str, overlay: Overlay) -> Iterator[BinaryIO]:
    """The overlay's file through a second descriptor, since the first one belongs to Storage. Reading needs no lock."""
    with open(path, "rb") as file:
        if not os.path.samestat(os.fstat(file.fileno()), overlay.file_status()):
            raise QedfsError(f"{path}: was replaced by another file while it was being opened; try again")
        yield file


def _copy(source: BinaryIO, run: Run, target: BinaryIO, progress: CopyProgress) -> None:
    """Copy one run of data. The kernel shares the blocks if the file system can, and copies them otherwise."""
    offset, pos, left = run.offset, run.pos, run.size
    while left:
        try:
            done = os.copy_file_range(source.fileno(), target.fileno(), min(left, COPY_BYTES), offset, pos)
        except OSError as exc:
            if exc.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            done = 0
        if not done:
            # The two file systems cannot copy to each other, or the file ends inside a cluster.
            done = _copy_by_hand(source, target, offset, pos, min(left, COPY_BYTES))
        offset, pos, left = offset + done, pos + done, left - done
        progress.add(done)


def _copy_by_hand(source: BinaryIO, target: BinaryIO, offset: int, pos: int, size: int) -> int:
    source.seek(offset)
    data = source.read(size)
    target.seek(pos)
    target.write(data)
    target.flush()
    # Past the end of the file are zeros, and the target has a hole there already.
    return len(data) or size


@contextlib.asynccontextmanager
async def _over_backing(overlay: Overlay, export: _Export) -> AsyncIterator[Image]:
    """The image with its backing, in the version that the overlay is pinned to. Keeps nothing."""
    # Imported here because loading libcurl is slow.
    from qedfs.fetch.queue import FetchQueue
    from qedfs.image.image import Image
    from qedfs.source.open import remote_source
    from qedfs.source.policy import Policy
    from qedfs.source.url import parse_location

    asking = export.asking
    location = parse_location(overlay.backing or "", relative_to=_folder(export.path))
    async with trio.open_nursery() as nursery:
        remote = remote_source(
            location,
            Policy(asking.allow_backing),
            nursery,
            deadline_seconds=asking.timeout_seconds,
            raw=not overlay.probes_backing,
            credentials=asking.credentials,
            pinning=asking.pinning,
        )
        try:
            fetch = FetchQueue(remote, overlay.cluster_size, nursery)
            yield Image(export.path, overlay, fetch, copy_on_read=False)
        finally:
            with trio.CancelScope(shield=True):
                await remote.aclose()
        nursery.cancel_scope.cancel()


async def _fetch(overlay: Overlay, export: _Export, missing: list[Run], target: BinaryIO) -> int:
    """Write the missing runs. Returns how many bytes of them are data."""
    written, progress = 0, export.progress
    async with _over_backing(overlay, export) as image:
        inside = list(_clipped(missing, await image.source_size()))
        # What lies past the end of the backing is zeros, and needs no copy.
        progress.add(sum(run.size for run in missing) - sum(run.size for run in inside))
        pieces = _cut(inside)

        async def fetch_pieces() -> None:
            nonlocal written
            for pos, size in pieces:
                data = await image.read(pos, size)
                # No await from seek to write: the position of the file is shared.
                written += _write_sparse(target, pos, data)
                progress.add(size)

        async with trio.open_nursery() as fetching:
            for _ in range(FETCHES):
                fetching.start_soon(fetch_pieces)
    return written


def _write_sparse(target: BinaryIO, pos: int, data: Buffer) -> int:
    """Write the blocks that are not all zeros. Returns their size in bytes."""
    written = 0
    view = memoryview(data)
    for start in range(0, len(view), HOLE_BYTES):
        part = view[start : start + HOLE_BYTES]
        if not ZEROS.startswith(part):
            target.seek(pos + start)
            written += target.write(part)
    return written


def _clipped(runs: list[Run], end: int) -> Iterator[Run]:
    """The parts of the runs before `end`."""
    for run in runs:
        if run.pos < end:
            yield run._replace(size=min(run.size, end - run.pos))


def _cut(runs: list[Run]) -> Iterator[tuple[int, int]]:
    """(pos, size) of the pieces, each of which becomes one request. All fetching tasks share this iterator."""
    for run in runs:
        for pos in range(run.pos, run.pos + run.size, FETCH_BYTES):
            yield pos, min(FETCH_BYTES, run.pos + run.size - pos)


def _folder(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))
