"""Opens an overlay, makes an image of it with its source and its jobs, and closes it. Several may be opened at once.

Owns the checks before an overlay is opened, the choice between writable and read-only, and the release of sources.
Must not know the inodes of the mount, nor when overlays appear and disappear.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable

import trio

from qedfs.errors import BadOverlay, Inaccessible, InUse, NoMemory, QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.host import memory_pool
from qedfs.host.descriptors import check_room
from qedfs.image.image import Image
from qedfs.image.source_errors import from_stored
from qedfs.image.stalls import Stalls, StallSlots
from qedfs.image.standby_record import put_in_standby
from qedfs.image.write_gate import WriteGate
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.stream import StreamJob
from qedfs.mount.fuse_init import background_limit
from qedfs.mount.late_records import LateRecords
from qedfs.mount.open_images import OpenImages, same_file
from qedfs.mount.options import Options
from qedfs.mount.overlay_folder import SUFFIX, OverlayFolder
from qedfs.mount.own_backing import ImageBacking
from qedfs.mount.request_timeout import most_wait_seconds
from qedfs.mount.settling import check_settled
from qedfs.mount.source_pool import SourcePool
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.source.url import Location
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
        late: LateRecords,
    ) -> None:
        """`images`: the opener records there which images are open. `hold_off`: why streams must wait, "" if not."""
        self._folder = folder
        self._options = options
        self._sources = sources
        self._images = images
        self._hold_off = hold_off
        self._late = late
        self._stall_slots = StallSlots(background_limit())
        self._most_wait_seconds = most_wait_seconds()
        self._opening = 0  # overlays that are being opened, not counted in `images` yet
        self._asking = trio.Lock()  # held while a source is looked for: one at a time makes a source that is not there

    def begin_scan(self) -> None:
        """Call this before a series of `open`. Together they get a fixed time for the first checks of their sources."""
        self._sources.begin_scan()

    async def open(self, path: str, name: str, *, is_new: bool) -> tuple[Image, ImageJobs]:
        """Open an overlay as the image `name`. Returns the image and its jobs, which do not run yet.

        `is_new`: the file appeared after the first scan, so it may be incomplete because it is still being copied.

        Raises:
            QedfsError: it cannot be served.
            OSError: its attributes cannot be read, or no descriptor is left.
        """
        self._opening += 1
        try:
            return await self._open(path, name, is_new=is_new)
        finally:
            self._opening -= 1

    async def _open(self, path: str, name: str, *, is_new: bool) -> tuple[Image, ImageJobs]:
        overlay = await self._open_overlay(path, is_new=is_new)
        try:
            self._check_clusters(path, overlay)
            await self._late.take_back(overlay)
            if self._options.standby:
                await put_in_standby(path, overlay)
            fetch, standby = None, None
            overlays = len(self._images) + self._opening
            async with self._asking:
                if overlay.backing is not None and overlay.record.standby.waits:
                    through = await self._sources.pass_through_for(overlay, overlays=overlays)
                    gate = WriteGate(name, self._options.standby_writes, most_seconds=self._most_wait_seconds)
                    standby = through, gate
                else:
                    fetch = await self._sources.fetch_for(overlay, overlays=overlays)
                    await self._check_backing(path, fetch)
        except BaseException:
            # Even if cancelled: the locks of an open descriptor would keep the overlay in use.
            with trio.CancelScope(shield=True):
                await overlay.close()
            raise
        options = self._options
        keep = overlay.record.copy_on_read if options.copy_on_read is None else options.copy_on_read
        image = Image(name, overlay, fetch, copy_on_read=keep, standby=standby)
        rule = options.on_source_error or from_stored(overlay.record.on_source_error)
        image.stalls = Stalls(rule, slots=self._stall_slots, kernel_seconds=self._most_wait_seconds)
        enabled = options.stream and not image.in_standby
        stream = StreamJob(image, enabled=enabled, limit=options.limit, hold_off=self._hold_off)
        image.own_backing = ImageBacking(image, self._sources, self._images)
        self._images.add(image)
        return image, ImageJobs(stream)

    async def _check_backing(self, path: str, fetch: FetchQueue | None) -> None:
        """Raise InUse if this mount itself changes the backing, which is another version then."""
        if fetch is None:
            return
        location = fetch.remote.location
        if (writer := await self._writer(location)) is not None:
            why = (
                f"is being written: {writer.name} is committed into it, after which overlays that were made before are"
            )
            why += " useless"
        elif self._serves(location):
            why = "is in the mounted folder, so that the mount serves it as an image, and changes it; keep it elsewhere"
        else:
            return
        if not self._images.need(fetch.remote):
            await self._sources.release(fetch.remote)
        raise InUse(f"{path}: its backing {location} {why}")

    async def _writer(self, location: Location) -> Image | None:
        """The image that is being committed into the file of a backing, whichever of its names that backing has."""
        for image in self._images.committing():
            if image.source is not None and await same_file(image.source.location, location):
                return image
        # Last: no other task runs between this and the end of the opening, so no commit begins unnoticed.
        return self._images.committing_into(location.secret_url)

    def _serves(self, location: Location) -> bool:
        """Whether a backing is an overlay of the mounted folder, and served for writing: that alone moves its mtime."""
        path = os.path.normpath(location.path or "")
        root, name = os.path.split(path)
        folder = self._folder
        if location.kind != "file" or folder.single or root != folder.root or not name.endswith(SUFFIX):
            return False
        try:
            regular = stat.S_ISREG(folder.lstat(name).st_mode)
            return regular and not self._options.read_only and os.access(name, os.W_OK, dir_fd=folder.fd)
        except OSError:
            return False  # the source says what is wrong

    async def _open_overlay(self, path: str, *, is_new: bool) -> Overlay:
        check_room(len(self._images) + self._opening, self._sources.count)
        if stat.S_ISLNK(self._folder.lstat(path).st_mode):
            raise BadOverlay(f"{path}: is a symbolic link; name the overlay itself")
        await check_settled(path, self._folder.fd, is_new=is_new)
        journals, dir_fd = self._options.journal_folder, self._folder.fd
        try:
            return await open_overlay(
                path,
                writable=not self._options.read_only,
                journal_folder=journals,
                dir_fd=dir_fd,
                session_prefix=self._options.session_prefix,
            )
        except Inaccessible as exc:
            cause = exc.__cause__
            refused = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
            if self._options.read_only or not refused:
                raise
        overlay = await open_overlay(path, writable=False, journal_folder=journals, dir_fd=dir_fd)
        log.warning("%s: is not writable; it is served read-only, nothing that is fetched is kept", path)
        return overlay

    def _check_clusters(self, path: str, overlay: Overlay) -> None:
        """Raise NoMemory if a cluster, which is fetched and merged with writes as a whole, does not fit into memory."""
        most = memory_pool.largest_cluster()
        if overlay.backing is not None and overlay.writable and overlay.cluster_size > most:
            raise NoMemory(
                f"{path}: its clusters of {format_size(overlay.cluster_size)} are too large for the memory that this "
                f"mount may use; the limit is {format_size(most)}"
            )

    async def close(self, image: Image) -> QedfsError | None:
        """Flush and close an image. Returns an error if the last writes may not be in the overlay."""
        try:
            with trio.CancelScope(shield=True):
                await image.close()
        except QedfsError as exc:
            log.error("%s: %s", image.name, exc)
            return exc
        except Exception:
            # The other images must be flushed and closed all the same.
            log.exception("%s: cannot be closed", image.name)
            return QedfsError(f"{image.name}: cannot be closed: internal error, see the log")
        finally:
            self._images.discard(image)
        return None

    async def release_source(self, image: Image) -> None:
        """Close the connections to the source of an image, unless an image still needs that source."""
        if image.source is not None and not self._images.need(image.source):
            await self._sources.release(image.source)
