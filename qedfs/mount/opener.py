"""Opens one overlay as an image that can be served, and closes it.

Owns what has to hold before an overlay is opened, and how: whole, writable if it may be, with its source and its
stream. Must not know names and inodes of the mount, nor when an overlay comes and goes.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable

import trio

from qedfs.errors import BadOverlay, NoMemory, QedfsError, UsageError
from qedfs.host import memory_pool
from qedfs.host.descriptors import check_room
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob
from qedfs.mount.open_images import OpenImages
from qedfs.mount.options import Options
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.settling import check_settled
from qedfs.mount.source_pool import SourcePool
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.units import format_size

log = logging.getLogger(__name__)


class Opener:
    """Opens the overlays of one folder."""

    def __init__(
        self,
        folder: OverlayFolder,
        options: Options,
        sources: SourcePool,
        images: OpenImages,
        hold_off: Callable[[], str],
    ) -> None:
        """`images`: what is open is noted there. `hold_off`: why streams should wait, "" if they may run."""
        self._folder = folder
        self._options = options
        self._sources = sources
        self._images = images
        self._hold_off = hold_off

    def renew_patience(self) -> None:
        """Several overlays will be opened now, which share the time for a first look at their sources."""
        self._sources.renew_patience()

    async def open(self, path: str, name: str, *, came: bool) -> tuple[Image, StreamJob]:
        """Open an overlay as the image `name`, and return that with its stream, which does not run yet.

        `came`: the file did while we serve, and may still be being copied.

        Raises:
            QedfsError: it cannot be served.
            OSError: it cannot be looked at.
        """
        overlay = await self._open_overlay(path, came=came)
        try:
            self._check_clusters(path, overlay)
            fetch = await self._sources.fetch_for(overlay, overlays=len(self._images) + 1)
        except BaseException:
            # Also if cancelled: the descriptor's locks would keep the overlay in use for as long as we run.
            with trio.CancelScope(shield=True):
                await overlay.close()
            raise
        options = self._options
        keep = overlay.record.copy_on_read if options.copy_on_read is None else options.copy_on_read
        image = Image(name, overlay, fetch, copy_on_read=keep)
        job = StreamJob(image, enabled=options.stream, limit=options.limit, hold_off=self._hold_off)
        self._images.add(image)
        return image, job

    async def _open_overlay(self, path: str, *, came: bool) -> Overlay:
        check_room(len(self._images) + 1, self._sources.count)
        if stat.S_ISLNK(self._folder.lstat(path).st_mode):
            raise BadOverlay(f"{path}: is a symbolic link; name the overlay itself")
        await check_settled(path, self._folder.fd, came=came)
        journals, dir_fd = self._options.journal_folder, self._folder.fd
        try:
            return await open_overlay(
                path, writable=not self._options.read_only, journal_folder=journals, dir_fd=dir_fd
            )
        except UsageError as exc:
            cause = exc.__cause__
            refused = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
            if self._options.read_only or not refused:
                raise
        overlay = await open_overlay(path, writable=False, journal_folder=journals, dir_fd=dir_fd)
        log.warning("%s: is not writable; it is served read-only, nothing that is fetched is kept", path)
        return overlay

    def _check_clusters(self, path: str, overlay: Overlay) -> None:
        """Raise NoMemory if the overlay cannot be filled: clusters are brought in, and merged with writes, whole."""
        most = memory_pool.largest_cluster()
        if overlay.backing is not None and overlay.writable and overlay.cluster_size > most:
            raise NoMemory(
                f"{path}: its clusters of {format_size(overlay.cluster_size)} are too large for the memory that this "
                f"mount may use, which has room for clusters of {format_size(most)}"
            )

    async def close(self, image: Image) -> QedfsError | None:
        """Flush and close an image; returns why what was written last may not be in the overlay."""
        try:
            with trio.CancelScope(shield=True):
                await image.close()
        except QedfsError as exc:
            log.error("%s: %s", image.name, exc)
            return exc
        except Exception:
            # The others have to be flushed and closed all the same.
            log.exception("%s: cannot be closed", image.name)
            return QedfsError(f"{image.name}: cannot be closed: internal error, see the log")
        finally:
            self._images.discard(image)
        return None

    async def let_go(self, image: Image) -> None:
        """Drop the connections to the source of an image that needs it no longer, if no other one does."""
        if image.source is not None and not self._images.need(image.source):
            await self._sources.let_go(image.source)
