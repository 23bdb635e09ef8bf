"""Brings in first what a profile lists: what a reader of such an image is about to ask for, in that order.

Owns the walk over the list. Must not know files or commands. It is a hint: a source that fails ends it, and readers
then meet the same failure themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qedfs.errors import QedfsError
from qedfs.format.tables import MISSING
from qedfs.image import Image
from qedfs.profile import Range

log = logging.getLogger(__name__)


async def replay(image: Image, ranges: Sequence[Range]) -> None:
    """Ask for the missing clusters of these ranges, ahead of the stream and beside waiting readers.

    Without copy-on-read nothing would be kept, so nothing is asked for.
    """
    if not ranges or image.complete or not image.copy_on_read:
        return
    try:
        end = min(image.size, await image.source_size())
        for pos, size in ranges:
            if pos < end:
                await _bring(image, pos, min(size, end - pos))
    except QedfsError as exc:
        log.warning("%s: the profile is left: %s", image.name, exc)


async def _bring(image: Image, pos: int, size: int) -> None:
    fetch, cluster_size = image.fetch, image.overlay.cluster_size
    if fetch is None or image.complete:
        return
    most = max(1, fetch.window.request_bytes // cluster_size)
    for run in await image.overlay.map(pos, size):
        if run.offset != MISSING:
            continue
        first, last = run.pos // cluster_size, (run.pos + run.size - 1) // cluster_size
        for at in range(first, last + 1, most):
            count = min(most, last + 1 - at)
            await fetch.turn(at, count, taker=image, preferred=True)
            # Meanwhile a reader or the stream may have brought them in.
            if not image.complete and image.overlay.clusters.all_missing(at, count):
                fetch.start(at, count, taker=image, asked=True)
