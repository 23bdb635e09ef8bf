"""Changes what an image does about a source that is away, while it is served. Must not know who asks for that."""

from __future__ import annotations

import dataclasses

import trio

from qedfs.image.image import Image
from qedfs.image.source_errors import OnSourceError


async def set_source_errors(image: Image, rule: OnSourceError) -> None:
    """Change the rule, at once, also for requests that wait, and for later mounts if the overlay is writable.

    Raises what a change of the overlay's record raises. The rule holds for this mount all the same.
    """
    image.stalls.set_rule(rule)
    if not rule.wait and image.source is not None:
        # Those that are just being tried again have waited long enough, too.
        image.reads.waiting.end(
            since=trio.current_time() - image.source.deadline_seconds, why="its backing does not answer"
        )
    overlay, stored = image.overlay, rule.stored()
    if overlay.writable and not image.complete and overlay.record.on_source_error != stored:
        await overlay.change_record(lambda record: dataclasses.replace(record, on_source_error=stored))
