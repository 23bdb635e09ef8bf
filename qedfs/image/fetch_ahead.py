"""Fetches ahead of the sequential readers of one image.

Owns how far that goes, and which missing clusters it requests. `readahead.py` detects the readers. Must not know who
reads. Nobody waits for what is fetched here, so a failure costs nobody anything.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qedfs.errors import QedfsError
from qedfs.format.tables import MISSING
from qedfs.image.readahead import Readahead

if TYPE_CHECKING:
    from qedfs.image.image import Image

log = logging.getLogger(__name__)

AHEAD_SECONDS = 5.0  # read-ahead fetches at most what the link transfers in this time
MOST_AHEAD_BYTES = 48 << 20  # and at most this, well below what may wait for one disk (`budget.py`)
AHEAD_UNKNOWN_BYTES = 2 << 20  # the limit while the rate of the link is unknown


class FetchAhead:
    """The read-ahead of one image."""

    def __init__(self, image: Image) -> None:
        # Whether a sequential reader has been seen. From then on `fetch` needs every read, not only the misses.
        self.active = False
        self._image = image
        self._readahead = Readahead()

    def forget(self) -> None:
        """Forget the readers: what was requested for them will not arrive."""
        self.active = False
        self._readahead = Readahead()

    def fetch(self, pos: int, size: int) -> None:
        """Note a read, and start read-ahead for it if it continues earlier ones.

        It reaches up to three windows ahead, because a part of them has arrived, but has not been read yet.
        """
        image = self._image
        identity = image.version.identity if image.version is not None else None
        if not image.copy_on_read or image.in_standby or image.fetch is None or identity is None:
            return
        window = image.fetch.window
        # On a slow link, read-ahead also delays the reader's next request. So limit it to a few seconds.
        most = int(min(3 * window.bytes, AHEAD_SECONDS * window.rate)) if window.rate else AHEAD_UNKNOWN_BYTES
        most = min(most, MOST_AHEAD_BYTES)
        advice = self._readahead.advise(pos, size, most=most, step=window.request_bytes)
        self.active = self._readahead.active
        if advice is None:
            return
        start, length = advice[0], min(advice[1], min(image.size, identity.size) - advice[0])
        if length <= 0:
            return
        if image.overlay.is_loaded(start, length):
            self.start(start, length)
        else:
            image.fetch.nursery.start_soon(self.load_and_start, start, length)

    async def load_and_start(self, pos: int, size: int) -> None:
        """Load the map of a range, then request what is missing of it. Raises nothing."""
        try:
            await self._image.overlay.map(pos, size)
            self.start(pos, size)
        except QedfsError as exc:
            # Nobody waits for these bytes. A reader that needs them gets the same error and reports it.
            log.debug("%s: no read-ahead at %d: %s", self._image.name, pos, exc)
        except Exception:
            # This task runs in a nursery of the mount. If it raised, a bug here would end every image.
            log.exception("%s: no read-ahead at %d", self._image.name, pos)

    def start(self, pos: int, size: int) -> None:
        """Request what is missing of a range whose map is loaded."""
        image = self._image
        # The stream may have finished while the map was loaded, so the source may be closed.
        if image.fetch is None or image.closed or image.complete:
            return
        for run in image.overlay.map_now(pos, size) or ():
            if run.offset == MISSING:
                first = run.pos // image.overlay.cluster_size
                count = (run.pos + run.size - 1) // image.overlay.cluster_size - first + 1
                started = image.fetch.ahead(first, count, consumer=image.consumer)
                if started < count:
                    self._readahead.fell_short((first + started) * image.overlay.cluster_size, pos + size)
                    return
