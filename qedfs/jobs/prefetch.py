"""The prefetch of a boot profile: fetches its ranges before the stream, in the order in which a guest will need them.

Owns the walk over the ranges. Must not know files or commands. It is one function and no `Job`: it runs once, after the
image is opened, and has no states and no commands. A profile is only a hint: if the source fails, the prefetch ends,
and readers get the same failure themselves. Nobody waits for its bytes, so they count against the limit of the image,
and the stream waits until the profile is through.
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

STEPS_PER_TURN = 4  # steps within a range before other tasks get their turn


async def replay(image: Image, ranges: Sequence[Range]) -> None:
    """Fetch the missing clusters of these ranges, before the stream, and without holding back for waiting readers.

    Does nothing without copy-on-read, because nothing would be kept. Ends with the first failure of the source or the
    overlay.
    """
    if not ranges or image.complete or not image.copy_on_read:
        return
    if image.gate is not None:
        await image.gate.opened()  # in standby nothing would be kept
    known_failures = image.failures
    image.replaying = True
    try:
        end = min(image.size, await image.source_size())
        for pos, size in ranges:
            if pos < end and not await _bring(image, pos, min(size, end - pos), known_failures):
                return
    except QedfsError as exc:
        log.warning("%s: the profile is abandoned: %s", image.name, exc)
    finally:
        image.replaying = False


async def _bring(image: Image, pos: int, size: int, known_failures: int) -> bool:
    """Fetch one range, in pieces of one request. Returns False if there is nothing more to do for this image."""
    fetch, cluster_size = image.fetch, image.overlay.cluster_size
    if fetch is None:
        return False
    most = min(fetch.window.request_bytes, fetch.piece_bytes(image.consumer))
    step = max(1, int(most // cluster_size)) * cluster_size
    for number, at in enumerate(range(pos - pos % cluster_size, pos + size, step), 1):
        if number % STEPS_PER_TURN == 0:
            # A range may be as long as the image.
            await trio.lowlevel.checkpoint()
        for run in await image.overlay.map(at, min(step, pos + size - at)):
            if run.offset != MISSING:
                continue
            first = run.pos // cluster_size
            count = (run.pos + run.size - 1) // cluster_size + 1 - first
            await image.limiter.until_due()
            await fetch.turn(first, count, consumer=image.consumer, preferred=True)
            if image.complete or image.full or image.failures != known_failures or not image.overlay.writable:
                return False
            # A reader or the stream may have fetched them meanwhile.
            if image.overlay.all_missing(first, count):
                fetch.start(first, count, consumer=image.consumer, asked=True)
    return True
