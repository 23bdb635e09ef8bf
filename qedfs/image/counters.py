"""What an image has moved since it was opened. Must not know who reads the figures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """Bytes since the image was opened, for status and metrics."""

    read: int = 0
    written: int = 0
    missed: int = 0  # read from clusters that were missing
    discarded: int = 0  # by guests, before they were fetched, in whole clusters
    kept_asked: int = 0  # adopted because a reader of this image wanted them
    kept_stream: int = 0  # adopted from background requests, and from those of other images

    @property
    def kept(self) -> int:
        """Bytes that were adopted."""
        return self.kept_asked + self.kept_stream
