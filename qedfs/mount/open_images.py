"""The images of a mount that are open, taken together: how many there are, and how busy.

Also those whose overlay has left the folder, as long as somebody uses them or they are being closed.
"""

from __future__ import annotations

from qedfs.image.image import Image
from qedfs.source.retrying import RetryingSource


class OpenImages:
    """The images that have their overlay open."""

    def __init__(self) -> None:
        self._images: set[Image] = set()

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: Image) -> None:
        """It has been opened."""
        self._images.add(image)

    def discard(self, image: Image) -> None:
        """It has been closed."""
        self._images.discard(image)

    def activity(self) -> int:
        """Changes whenever a guest reads or writes."""
        return sum(image.counters.read + image.counters.written for image in self._images)

    def barrier_seconds(self) -> float:
        """How long barriers have taken so far."""
        return sum(image.overlay.barrier_seconds for image in self._images)

    def need(self, source: RetryingSource) -> bool:
        """Whether one of them is still being filled from this source."""
        return any(image.source is source and not image.complete for image in self._images)
