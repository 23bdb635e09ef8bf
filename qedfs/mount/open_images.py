"""The open images of a mount as a whole: their number, their load, and the sources that they still need.

They include images whose overlay was removed from the folder, until they are closed.

Owns the set, and the comparison of sources. Must not know names or the folder (`registry.py`), nor when an image is
opened or closed (`opener.py`).
"""

from __future__ import annotations

import contextlib
import os

import trio

from qedfs.image.image import Image
from qedfs.source.path import in_thread
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import Location

SAME_FILE_SECONDS = 5.0  # a file server may be dead


class OpenImages:
    """The images whose overlay is open."""

    def __init__(self) -> None:
        self._images: set[Image] = set()

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: Image) -> None:
        """Count an image that was opened."""
        self._images.add(image)

    def discard(self, image: Image) -> None:
        """Forget an image that was closed."""
        self._images.discard(image)

    def activity(self) -> int:
        """A number that changes whenever a guest reads or writes."""
        return sum(image.counters.read + image.counters.written for image in self._images)

    def barrier_seconds(self) -> float:
        """Seconds spent in barriers."""
        return sum(image.overlay.barrier_seconds for image in self._images)

    def need(self, source: RetryingSource) -> bool:
        """Whether an image that is not complete uses this source."""
        return any(image.source is source and not image.complete for image in self._images)

    def committing(self) -> list[Image]:
        """The images that are being committed into their backings."""
        return [image for image in self._images if image.committing_down]

    def committing_into(self, place: str) -> Image | None:
        """The image that is being committed into the file at this place, the secret URL of a source; None if none."""
        for image in self.committing():
            if image.source is not None and image.source.location.secret_url == place:
                return image
        return None

    async def link(self, image: Image) -> bool:
        """Whether another image that is not complete has the same file as its source, by a link or another name."""
        for other in list(self._images):
            if other is image or other.complete or other.source is None or image.source is None:
                continue
            if await same_file(other.source.location, image.source.location):
                return True
        return False

    def share(self, image: Image) -> bool:
        """Whether another image that is not complete has the same place as its source."""
        if image.source is None:
            return False
        place = image.source.location.secret_url
        others = (other for other in self._images if other is not image and not other.complete)
        return any(other.source is not None and other.source.location.secret_url == place for other in others)


async def same_file(one: Location, other: Location) -> bool:
    """Whether two places are one file, as by a link. False if that cannot be found out within SAME_FILE_SECONDS."""
    first, second = one.path, other.path
    if first is None or second is None or not one.kind == other.kind == "file":
        return False
    with trio.move_on_after(SAME_FILE_SECONDS), contextlib.suppress(OSError):
        return await in_thread(second, lambda: os.path.samefile(first, second))
    return False
