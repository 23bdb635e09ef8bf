"""The image of an overlay file, which nobody has mounted, goes into a raw file or into standard output.

Owns which bytes are copied, which are fetched, and that they are those of one overlay from the first to the last. Must
not know what becomes of the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

import trio

from qedfs.cli.commands.map import whole_map
from qedfs.cli.digest_option import ExpectedDigest
from qedfs.cli.exporting.raw_file import ReadBack, write_sparse
from qedfs.cli.image_pipe import write_all, write_in_order
from qedfs.cli.locked_file import image_explained
from qedfs.cli.ui.copy_progress import CopyProgress
from qedfs.errors import InStandby, QedfsError
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.source.credentials import Credentials
from qedfs.source.pinning import Pinning
from qedfs.units import format_size

if TYPE_CHECKING:
    from qedfs.image.image import Image

COPY_BYTES = 8 << 20
FETCH_BYTES = 1 << 20
FETCHES = 8  # concurrent reads of the backing


@dataclasses.dataclass(frozen=True, slots=True)
class Asking:
    """How the backing may be read."""

    allow_backing: tuple[str, ...]
    credentials: Credentials
    timeout_seconds: float
    pinning: Pinning
    with_backing: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """What is written, and how."""

    path: str  # of the overlay
    name: str  # what the user calls it
    asking: Asking
    progress: CopyProgress
    expected: ExpectedDigest | None


async def export_overlay(export: Export, target: BinaryIO | None) -> dict[str, int]:
    """Write the image to the new file `target`, or to standard output. Returns its size, and how much of it is data.

    Raises:
        QedfsError: something is missing that is not to be fetched, or the digest is another one.
        BadOverlay: the overlay is damaged, or was changed meanwhile by somebody who has not asked for its locks.
    """
    with image_explained(export.path):
        overlay = await open_overlay(export.path, writable=False)
    try:
        data, missing = await _runs(overlay, export)
        if target is None:
            await _pipe(overlay, export, fetched=bool(missing))
            written = 0
        else:
            written = await _to_file(overlay, export, data, missing, target)
        # After all reads: if somebody has truncated the overlay meanwhile, we have read zeros past its end.
        await overlay.inspect()
        if export.expected is not None:
            export.expected.check(export.name)
        return {"size": overlay.image_size, "data_size": written}
    finally:
        overlay.close_now()


async def _runs(overlay: Overlay, export: Export) -> tuple[list[Run], list[Run]]:
    """The runs of data, and those that have to be fetched. Raises QedfsError if that is not wanted."""
    name = export.name
    if export.asking.with_backing and overlay.record.standby.waits:
        raise InStandby(f"{name}: is in standby: its backing may still change while it is read; activate it first")
    runs = [run async for run in whole_map(overlay)]
    missing = [run for run in runs if run.offset == MISSING] if overlay.backing is not None else []
    if missing and not export.asking.with_backing:
        size = format_size(sum(run.size for run in missing))
        raise QedfsError(f"{name}: {size} is still missing; mount it until it is complete, or use --with-backing")
    return [run for run in runs if run.offset > ZERO], missing


async def _to_file(overlay: Overlay, export: Export, data: list[Run], missing: list[Run], target: BinaryIO) -> int:
    """Write to a file. Returns how many bytes of it are data."""
    target.truncate(overlay.image_size)
    export.progress.total = sum(run.size for run in [*data, *missing])
    read_back = ReadBack(target, export.expected)

    def copied(end: int) -> None:
        if not missing:  # otherwise there are still gaps before `end`
            read_back.up_to(end)

    with _opened_again(export.path, overlay) as source:
        for run in data:
            await trio.to_thread.run_sync(_copy, source, run, target, export.progress, copied)
    fetched = await _fetch(overlay, export, missing, target) if missing else 0
    await trio.to_thread.run_sync(read_back.up_to, overlay.image_size)
    return sum(run.size for run in data) + fetched


async def _pipe(overlay: Overlay, export: Export, *, fetched: bool) -> None:
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


@contextlib.contextmanager
def _opened_again(path: str, overlay: Overlay) -> Iterator[BinaryIO]:
    """The overlay's file through a second descriptor, since the first one belongs to Storage. Reading needs no lock."""
    with open(path, "rb") as file:
        if not os.path.samestat(os.fstat(file.fileno()), overlay.file_status()):
            raise QedfsError(f"{path}: was replaced by another file while it was being opened; try again")
        yield file


def _copy(source: BinaryIO, run: Run, target: BinaryIO, progress: CopyProgress, copied: Callable[[int], None]) -> None:
    """Copy one run of data. The kernel shares the blocks if the file system can, and copies them otherwise.

    `copied` is told, after each piece, where in the image it ends.
    """
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
        copied(pos)


def _copy_by_hand(source: BinaryIO, target: BinaryIO, offset: int, pos: int, size: int) -> int:
    source.seek(offset)
    data = source.read(size)
    target.seek(pos)
    target.write(data)
    target.flush()
    # Past the end of the file are zeros, and the target has a hole there already.
    return len(data) or size


@contextlib.asynccontextmanager
async def _over_backing(overlay: Overlay, export: Export) -> AsyncIterator[Image]:
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


async def _fetch(overlay: Overlay, export: Export, missing: list[Run], target: BinaryIO) -> int:
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
                written += write_sparse(target, pos, data)
                progress.add(size)

        async with trio.open_nursery() as fetching:
            for _ in range(FETCHES):
                fetching.start_soon(fetch_pieces)
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
