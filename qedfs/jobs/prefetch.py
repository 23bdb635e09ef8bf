"""Brings in first what a profile lists: what a reader of such an image is about to ask for, in that order.

Owns the walk over the list. Must not know files or commands. It is a hint: a source that fails ends it, and readers
then meet the same failure themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from qedfs.errors import QedfsError
from qedfs.format.tables import MISSING
from qedfs.image.boot_profile import Range
from qedfs.image.image import Image

log = logging.getLogger(__name__)

STEPS_PER_TURN = 4  # along one range, until other tasks get their turn


async def replay(image: Image, ranges: Sequence[Range]) -> None:
    """Ask for the missing clusters of these ranges, ahead of the stream and beside waiting readers.

    Without copy-on-read nothing would be kept, so nothing is asked for. Ends with the first failure of the source or
    of the overlay.
    """
    if not ranges or image.complete or not image.copy_on_read:
        return
    known_failures = image.failures
    try:
        end = min(image.size, await image.source_size())
        for pos, size in ranges:
            if pos < end and not await _bring(image, pos, min(size, end - pos), known_failures):
                return
    except QedfsError as exc:
        log.warning("%s: the profile is left: %s", image.name, exc)


async def _bring(image: Image, pos: int, size: int, known_failures: int) -> bool:
    """Ask for one range, in pieces of one request; False: there is no more to do for this image."""
    fetch, cluster_size = image.fetch, image.overlay.cluster_size
    if fetch is None:
        return False
    step = max(1, fetch.window.request_bytes // cluster_size) * cluster_size
    for number, at in enumerate(range(pos - pos % cluster_size, pos + size, step), 1):
        if number % STEPS_PER_TURN == 0:
            # A range may be as long as the image.
            await trio.lowlevel.checkpoint()
        for run in await image.overlay.map(at, min(step, pos + size - at)):
            if run.offset != MISSING:
                continue
            first = run.pos // cluster_size
            count = (run.pos + run.size - 1) // cluster_size + 1 - first
            await fetch.turn(first, count, consumer=image, preferred=True)
            if image.complete or image.full or image.failures != known_failures or not image.overlay.writable:
                return False
            # Meanwhile a reader or the stream may have brought them in.
            if image.overlay.all_missing(first, count):
                fetch.start(first, count, consumer=image, asked=True)
    return True
