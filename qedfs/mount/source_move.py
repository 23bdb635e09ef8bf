"""Gives an image another address of its source, while it is read and streamed.

Owns the order of the steps. `Image.exchange_source` is the heart of it, `Session.move_backing` tells the order of
writes. Must not know commands.

1. The new source is connected and compared: its size, a digest if both servers publish one, and the blocks that were
   fetched from the old one. Until then nothing has changed.
2. The overlay names the new source, durably, with a pin for it.
3. The image gets the new source. Requests that wait for the old one are run again. The old one is closed, unless other
   images use it.
"""

from __future__ import annotations

import logging
import stat

import trio

from qedfs.errors import InStandby, InUse, QedfsError, ReadOnlyOverlay, UsageError
from qedfs.image.image import Image
from qedfs.image.known_blocks import compared
from qedfs.image.pin import store_pin
from qedfs.mount.open_images import OpenImages
from qedfs.mount.rescue_source import check_elsewhere
from qedfs.mount.served import Served
from qedfs.mount.source_pool import SourcePool
from qedfs.overlay.create import encode_backing_name
from qedfs.overlay.overlay import Overlay
from qedfs.source.url import Location, parse_location

log = logging.getLogger(__name__)


class SourceMoves:
    """The moves of one mount."""

    def __init__(self, sources: SourcePool, images: OpenImages) -> None:
        self._sources = sources
        self._images = images

    async def move(self, served: Served, place: str, *, device: str, force: bool) -> None:
        """Give an image the source at `place`, a URL or an absolute path.

        `device`: the number of our own mount, as in /proc/self/mountinfo. `force`: also if no block is known that could
        be compared.

        Raises:
            SourceChanged: it is not the same disk. Nothing has changed, as after each of these errors.
            SourceUnreachable, SourceError: it is not there, or cannot be compared.
            Refused: the policy of the mount forbids it.
            UsageError: it is a file in this very mount, or a URL with a secret that others could read.
            QedfsError: the image needs no source or keeps nothing, or the overlay cannot name the new one.
        """
        async with served.cut_over:
            image = _image(served)
            encode_backing_name(place)
            location = parse_location(place, relative_to=self._sources.root)
            check_secrets(image.overlay, location)
            if location.kind == "file":
                await check_elsewhere(location, device)
            fetch = await self._sources.fetch_at(location, image.overlay, overlays=len(self._images))
            try:
                pin = await compared(image, place, fetch.remote, force=force)
                with trio.CancelScope(shield=True):
                    await image.overlay.move_backing(place, pin)
            except BaseException:
                self._sources.release_soon(fetch.remote)
                raise
            fetch.remote.samples.take_over(pin.samples)
            old = image.exchange_source(fetch)
            if image.overlay.record.pin != pin:
                # A check of the old source, which has just ended, may have stored its own.
                await store_pin(image.overlay, pin)
            if old is not None and not self._images.need(old):
                self._sources.release_soon(old)
            if served.jobs is not None:
                served.jobs.stream.poke()
            log.info("%s: its source is %s now", served.name, location)


def _image(served: Served) -> Image:
    image = served.image
    if image is None:
        raise QedfsError(f"{served.name}: is not served")
    if image.complete:
        raise UsageError(f"{served.name}: is complete, and needs no source")
    if image.in_standby:
        raise InStandby(f"{served.name}: is in standby; qedfs activate ends that")
    if image.committing_down:
        raise InUse(f"{served.name}: is being committed into its backing; qedfs commit --cancel ends that")
    if not image.writable:
        raise ReadOnlyOverlay(f"{served.name}: the overlay is read-only, so that it cannot name another source")
    return image


def check_secrets(overlay: Overlay, location: Location) -> None:
    """Raise UsageError if others could read a secret of the URL in the overlay."""
    mode = stat.S_IMODE(overlay.file_status().st_mode)
    if (location.stores_login or location.stores_query) and mode & 0o077:
        raise UsageError(
            "the URL may hold a secret, and others may read the overlay; chmod 600 it first, or use ~/.netrc or"
            " --credentials"
        )
