"""Lets an image grow while it is read, written and streamed.

Owns what stands against it, and what of the image follows from its size. `overlay/resize.py` owns the order of writes.
Must not know what else has to hear of it (the kernel).

What is new reads as zeros. An image over a larger backing, made with a size of its own, would show more of the backing
instead, or zeros where the stream had been first. So it does not grow. (QEMU refuses this as well.)
"""

from __future__ import annotations

import contextlib

from qedfs.errors import BadOverlay, InStandby, ReadOnlyOverlay, UsageError
from qedfs.image.image import Image
from qedfs.overlay.ranges import Ranges


async def grow(image: Image, size: int) -> None:
    """Let the image have `size` bytes, durably. Nothing happens if it has.

    Raises:
        UsageError: it has more, the size is not a multiple of 512 or more than the tables can map, or the backing is
            larger than the image.
        InStandby, ReadOnlyOverlay: it cannot be changed.
        SourceUnreachable, SourceError, SourceChanged: the size of the backing is not known.
        NoSpace, BadOverlay: the overlay cannot store it.
    """
    if image.in_standby:
        raise InStandby(f"{image.name}: is in standby, so its size is that of its source; qedfs activate ends that")
    if not image.writable:
        raise ReadOnlyOverlay(f"{image.name}: the overlay is read-only, so that it cannot record another size")
    if size < image.size:
        raise UsageError(f"{image.name}: has {image.size} bytes, and only grows while it is mounted")
    if size > image.size and image.version is not None and not image.complete:
        known = image.version.size
        check_backing(image.name, image.size, await image.source_size() if known is None else known)
    try:
        await image.overlay.grow(size)
    except UsageError as exc:
        raise UsageError(f"{image.name}: {exc}") from exc
    # No await since the overlay has the new size: a reader must not see a part of the change.
    image.size = image.overlay.image_size
    # The last table that lies in a hole of the source may map more of the image now.
    image.source_holes, image.discarded_holes = Ranges(), 0
    with contextlib.suppress(BadOverlay):  # about a bad table, which the first count has reported
        await image.overlay.count_missing()


def check_backing(name: str, image_size: int, backing_size: int) -> None:
    """Raise UsageError if an image that grows would show more of its backing. Sizes in bytes."""
    if backing_size > image_size:
        raise UsageError(
            f"{name}: its backing has {backing_size} bytes, and the image {image_size}: if it grew, it would show what"
            " was cut off; create a larger overlay of the backing instead"
        )
