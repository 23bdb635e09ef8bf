"""How much a commit of a served image into its backing would write: a dry run, after which both files are as before.

Owns the figures of one part of the image, and what is refused without an attempt. Must not know who asks for the parts,
nor how a commit is done (`live_commit.py`).

The overlay's entries come from memory, so nothing has to be committed to its file first. Guests go on, so each part
tells what it was at its moment. No version is stored that the overlay does not know yet. A look that is cancelled ends
even if the file server of the backing is dead, because the end of the mount waits for that.
"""

from __future__ import annotations

import os

import trio

from qedfs.errors import SourceChanged, UsageError
from qedfs.format.tables import MISSING
from qedfs.image.backing_file import find_file, open_to_look
from qedfs.image.commit_down import Committed, copy
from qedfs.image.commit_target import Target
from qedfs.image.image import Image
from qedfs.image.live_commit import shared_error, way_of
from qedfs.image.qed_target import QedTarget
from qedfs.overlay.overlay import Overlay
from qedfs.source.local import local_file

PIECE_BYTES = 1 << 20  # looked up and compared at once
PART_BYTES = 64 << 20  # of the overlay's own, in one call
MOST_PIECES = 2048  # in one call, most of which may have nothing
CLOSE_SECONDS = 1.0  # until a thread closes the file alone, as its server does not answer


async def look(image: Image, pos: int) -> tuple[Committed, int | None]:
    """What a commit would write of the image from `pos` on. Returns that, and where to go on; None: this was the end.

    Raises:
        InUse: another program has the backing open for writing, or another image of this mount has it.
        SourceChanged: it is not the version that the overlay was started from.
        Inaccessible: it cannot be written to.
        UsageError: it is of a kind that a mount does not write.
        QedfsError: as `LiveCommit`, or a file failed.
    """
    target = await _opened(image, first=not pos)
    try:
        return await _counted(image.overlay, target, pos)
    finally:
        await _close(target)


async def _opened(image: Image, *, first: bool) -> Target:
    """The backing, only for reading, after everything that can be refused.

    `first`: this is the first part, in which other images are asked, once, as each may have to look at its source.
    """
    own, location = way_of(image)
    overlay = image.overlay
    file = await find_file(location, own.policy, probes=overlay.probes_backing)
    if os.path.samestat(file.status, overlay.file_status()):
        raise UsageError(f"backing {location}: is the overlay itself")
    if image.version is not None:
        await image.version.compare()
    source = None if image.source is None else local_file(image.source.connected)
    if source is None or not source.is_on(file.status):
        raise SourceChanged(f"backing {location}: was replaced by another file since the mount has opened it")
    if first and await own.linked():
        raise shared_error(image, location)
    target = await open_to_look(location, file)
    if isinstance(target, QedTarget):
        try:
            target.check_settled()
        except BaseException:
            await _close(target)
            raise
    return target


async def _close(target: Target) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_SECONDS):
        await target.close()


async def _counted(overlay: Overlay, target: Target, pos: int) -> tuple[Committed, int | None]:
    # Also if there is nothing to copy: a commit begins with it.
    found = Committed(grown=max(0, overlay.image_size - target.size))
    cluster_size = overlay.cluster_size
    pos -= pos % cluster_size
    for _ in range(MOST_PIECES):
        if pos >= overlay.image_size:
            return found, None
        if found.data + found.zeros >= PART_BYTES:
            break
        if gap := await overlay.gap(pos // cluster_size):
            pos += gap * cluster_size
            continue
        piece = max(PIECE_BYTES, cluster_size)
        size = min(piece - pos % piece, overlay.image_size - pos)
        runs = await overlay.map(pos, size)
        if any(run.offset != MISSING for run in runs):
            with overlay.reading():
                await copy(overlay, runs, target, lambda _: None, found)
        pos += size
        await trio.lowlevel.checkpoint()
    return found, pos if pos < overlay.image_size else None
