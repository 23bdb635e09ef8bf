"""Which overlay files are served, under which names: the folder (or the one file) that was mounted.

Owns the list of served images and their inodes. Must not know FUSE requests. A file that cannot be served costs itself
only: it is kept in the list with the reason, for the log and for `status`.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from qedfs.errors import BadOverlay, InUse, NoMemory, QedfsError, UsageError
from qedfs.fetch.buffer_pool import BufferPool
from qedfs.fetch.queue import FetchQueue
from qedfs.host import memory_pool
from qedfs.host.descriptors import check_room
from qedfs.image.boot_profile import Range
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.jobs.idle import Idle, Pressure, Rules
from qedfs.jobs.prefetch import replay
from qedfs.jobs.stream import State, StreamJob
from qedfs.mount.settling import check_settled, settling
from qedfs.mount.source_pool import SourcePool
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.source.credentials import NO_CREDENTIALS, Credentials
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.policy import Policy
from qedfs.source.retrying import DEADLINE_SECONDS
from qedfs.units import format_size

log = logging.getLogger(__name__)

SUFFIX = ".qed"
# Overlays that are closed at once at the end: flushes wait for the disk, which takes many together.
CLOSING = 16
# Of this machine or of a file server, not of the file. EAGAIN: somebody has a lease on it.
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN}
)
INSPECT_SECONDS = 1.0  # between two looks whether an overlay file is still what it was: 5 us each
_UNSEEN = (0, 0, 0)  # what no file looks like: one that can be looked at later has changed


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What the user said at the mount, for every image of it."""

    stream: bool = True
    rules: Rules = dataclasses.field(default_factory=Rules)
    read_only: bool = False  # leave the overlays as they are
    copy_on_read: bool | None = None  # None: as the overlay says
    limit: int = 0  # bytes per second and image, 0 for none
    profile: tuple[Range, ...] = ()  # what to bring in first
    policy: Policy = dataclasses.field(default_factory=Policy)
    pinning: Pinning = USUAL
    credentials: Credentials = NO_CREDENTIALS
    deadline_seconds: float = DEADLINE_SECONDS
    journal_folder: Path | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Served:
    """One overlay file that was found. `image` is None, and `error` says why, if it cannot be served.

    Neither is there while the file is settling: it may still be being copied into the folder.
    """

    name: str
    path: str
    inode: int
    seen: tuple[int, int, int]  # inode, size and ctime of the file when it was opened
    image: Image | None = None
    job: StreamJob | None = None
    error: QedfsError | None = None
    opens: int = 0
    closes: int = 0  # of descriptors of these opens; one open may have several
    gone: bool = False  # the overlay has left the folder
    passing: bool = False  # what `error` says may pass though the file stays as it is
    status: Callable[[], os.stat_result] | None = None
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)

    @property
    def settling(self) -> bool:
        """Whether it is listed, so that nobody takes it for absent, but not looked into yet."""
        return self.image is None and self.error is None


class Folder:
    """The images of one mount."""

    def __init__(self, source: str, options: Options, nursery: trio.Nursery) -> None:
        """`source`: a folder of overlays, or one overlay file. `nursery` runs the images' tasks.

        Raises:
            UsageError: it is not there.
        """
        self.source = os.path.realpath(source)
        self._options = options
        self._nursery = nursery
        self._single = not os.path.isdir(self.source)
        self._root = os.path.dirname(self.source) if self._single else self.source
        try:
            # Held open, so that mounting over the folder itself does not hide the overlays from us.
            self._fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.stat(self.source)
        except OSError as exc:
            raise UsageError(f"{source}: {exc.strerror}; qedfs create makes an overlay") from exc
        self._by_path: dict[str, Served] = {}
        self._by_name: dict[str, Served] = {}
        self._by_inode: dict[int, Served] = {}
        self._inodes = itertools.count(2)  # 1 is the root
        self._lost: list[QedfsError] = []  # why answered writes may not be in an overlay that was closed
        self._closing = 0  # images that are being closed because their overlay has left
        self._sources = SourcePool(
            self._root,
            options.policy,
            options.deadline_seconds,
            nursery,
            pinning=options.pinning,
            credentials=options.credentials,
        )
        self._idle = Idle(options.rules, Pressure(self._barrier_seconds), self._activity)
        self._scanning = trio.Lock()
        self._scanned_mtime = -1
        self._scanned_before = False
        self.on_gone: Callable[[Served], None] = lambda _: None
        self.on_come: Callable[[Served], None] = lambda _: None

    # What is there.

    def by_name(self, name: str) -> Served | None:
        """The served image with this name."""
        return self._by_name.get(name)

    def by_inode(self, inode: int) -> Served | None:
        """The served image with this inode."""
        return self._by_inode.get(inode)

    def images(self) -> list[Served]:
        """All that can be read, in the order in which they came."""
        return [served for served in self._by_inode.values() if not served.gone]

    def everything(self) -> list[Served]:
        """All that was found, broken ones included, by name."""
        return sorted(self._by_path.values(), key=lambda served: served.name)

    @property
    def in_use(self) -> bool:
        """Whether anybody has an image open, or one is being closed; also of an overlay that has left the folder."""
        return bool(self._closing) or any(served.opens for served in self._by_inode.values())

    @property
    def _opened(self) -> int:
        """How many overlays we have open; also those that have left the folder."""
        return sum(served.image is not None for served in self._by_inode.values()) + self._closing

    def fetches(self) -> list[FetchQueue]:
        """The fetch queues in use, and the last ones that were: their counts are still of interest."""
        return self._sources.fetches()

    @property
    def buffers(self) -> BufferPool:
        """For what is fetched; shared by all images."""
        return self._sources.buffers

    def stat(self) -> os.stat_result:
        """The folder's attributes."""
        return os.fstat(self._fd)

    def statvfs(self) -> os.statvfs_result:
        """The folder's file system."""
        return os.fstatvfs(self._fd)

    def _activity(self) -> int:
        """Changes whenever a guest reads or writes."""
        counters = [served.image.counters for served in self._by_inode.values() if served.image is not None]
        return sum(counter.read + counter.written for counter in counters)

    def _barrier_seconds(self) -> float:
        images = [served.image for served in self._by_inode.values() if served.image is not None]
        return sum(image.overlay.barrier_seconds for image in images)

    # Looking.

    async def rescan(self, *, broken: bool = False) -> bool:
        """Look again if the folder has changed; returns whether it did look.

        `broken`: also if there are overlays that could not be served. A file that is repaired in place, and one that
        its other user has closed, leave no trace in the folder.
        """
        if self._single or not (self.stat().st_mtime_ns != self._scanned_mtime or (broken and self._any_broken())):
            return False
        await self.scan()
        return True

    def _any_broken(self) -> bool:
        return any(served.image is None for served in self._by_path.values())

    async def look(self) -> None:
        """Look again, changed or not; a single overlay is all that there can be.

        Raises:
            QedfsError: the folder cannot be read.
        """
        if self._single:
            return
        try:
            await self.scan()
        except OSError as exc:
            raise QedfsError(f"{self.source}: cannot be looked into: {exc.strerror}") from exc

    async def scan(self) -> None:
        """Bring the list up to date with the folder. A single overlay that cannot be served raises its QedfsError."""
        async with self._scanning:
            # Taken first: what comes while we look is looked for the next time.
            self._scanned_mtime = self.stat().st_mtime_ns
            try:
                await self._scan()
            except BaseException:
                self._scanned_mtime = -1  # what was not come to has to be looked for again
                raise
            self._scanned_before = True

    async def _scan(self) -> None:
        self._sources.renew_patience()
        found = dict(self._files())
        for path in [path for path in self._by_path if path not in found]:
            await self._remove(self._by_path[path])
        added: list[Served] = []
        try:
            for path, status in found.items():
                if served := await self._look_at(path, status):
                    added.append(served)
        finally:
            # Together: what the first stream fetches is of use to the others only once they stream as well. And
            # in any case: an image that is served without its tasks would never be committed.
            for served in added:
                self._nursery.start_soon(self._run, served)

    async def _look_at(self, path: str, status: os.stat_result | OSError) -> Served | None:
        """Take notice of one file; returns the image if one can be served now that could not before."""
        if isinstance(status, OSError):
            self._note_unseen(path, status)
            return None
        seen = (status.st_ino, status.st_size, status.st_ctime_ns)
        known = self._by_path.get(path)
        if known is not None and not known.settling:
            replaced = known.image is not None and known.seen[0] != status.st_ino
            retry = known.image is None and (known.seen != seen or known.passing)
            if not replaced and not retry:
                return None
            if replaced:
                await self._remove(known)
            # A broken one stays in the list until `_add` knows better, so that `status` never lacks it.
        elif self._scanned_before and settling(status):
            self._scanned_mtime = -1  # and look again
            self._by_path[path] = known or Served(_image_name(path), path, next(self._inodes), seen)
            return None
        return await self._add(path, seen, known.error if known else None)

    def _note_unseen(self, path: str, error: OSError) -> None:
        """A file is there and cannot be looked at. An image that is served goes on: it has its own descriptor."""
        known = self._by_path.get(path)
        if known is None or known.image is None:
            unseen = Served(_image_name(path), path, next(self._inodes), _UNSEEN)
            self._refuse(unseen, UsageError(f"{path}: {error.strerror}"), known.error if known else None)
            self._by_path[path] = unseen

    def _files(self) -> Iterator[tuple[str, os.stat_result | OSError]]:
        """The overlays that the folder holds; with an error those that cannot be looked at.

        One may be on a bad sector, or be the place of another file system: a mount that its user has made and does not
        let us into, or one whose server has died.
        """
        if self._single:
            yield self.source, os.stat(os.path.basename(self.source), dir_fd=self._fd)
            return
        with os.scandir(self._fd) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX))
        for name in names:
            found: os.stat_result | OSError
            try:
                found = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as exc:
                found = exc
            yield os.path.join(self._root, name), found

    # Coming and going.

    async def _add(self, path: str, seen: tuple[int, int, int], before: QedfsError | None) -> Served | None:
        """Open an overlay. `before`: why it could not be opened the last time, which the log has."""
        name = _image_name(path)
        served = Served(name, path, next(self._inodes), seen)
        try:
            await self._serve(served)
        except (QedfsError, OSError) as exc:
            if self._single:
                raise
            served.passing = _may_pass(exc)
            # OSError: the file went away, or its file system did, while we looked at it.
            self._refuse(served, exc if isinstance(exc, QedfsError) else UsageError(f"{path}: {exc.strerror}"), before)
        self._by_path[path] = served
        if served.image is None:
            return None
        self._by_name[name] = self._by_inode[served.inode] = served
        self.on_come(served)
        return served

    def _refuse(self, served: Served, error: QedfsError, before: QedfsError | None) -> None:
        """Note why an overlay is not served, and log it unless the log has it from `before`."""
        served.error = error.fresh()
        text = str(error)
        if text != str(before):
            log.error("not served: %s", text if text.startswith(served.path) else f"{served.path}: {text}")

    async def _serve(self, served: Served) -> None:
        self._check_not_ours(served.path)
        overlay = await self._open(served.path)
        try:
            self._check_clusters(served.path, overlay)
            fetch = await self._sources.fetch_for(overlay, overlays=self._opened + 1)
        except BaseException:
            # Also if cancelled: the descriptor's locks would keep the overlay in use for as long as we run.
            with trio.CancelScope(shield=True):
                await overlay.close()
            raise
        options = self._options
        keep = overlay.record.copy_on_read if options.copy_on_read is None else options.copy_on_read
        served.image = Image(served.name, overlay, fetch, copy_on_read=keep)
        served.status = overlay.file_status
        served.job = StreamJob(served.image, enabled=options.stream, limit=options.limit)
        served.job.hold_off = self._idle.reason

    def _check_clusters(self, path: str, overlay: Overlay) -> None:
        """Raise NoMemory if the overlay cannot be filled: clusters are brought in, and merged with writes, whole."""
        most = memory_pool.largest_cluster()
        if overlay.backing is not None and overlay.writable and overlay.cluster_size > most:
            raise NoMemory(
                f"{path}: its clusters of {format_size(overlay.cluster_size)} are too large for the memory that this "
                f"mount may use, which has room for clusters of {format_size(most)}"
            )

    def _check_not_ours(self, path: str) -> None:
        """Raise InUse if this mount has the file open under another name: one inode is one image."""
        found = os.stat(os.path.basename(path), dir_fd=self._fd, follow_symlinks=False)
        for other in self._by_inode.values():
            if not _is_file_of(other, found):
                continue
            name = os.path.basename(other.path)
            if other.gone:
                text = f"was {name}, whose image {other.name} somebody still has open; it is served when that is closed"
            else:
                text = f"is the same file as {name}, which is served as {other.name}"
            raise InUse(f"{path}: {text}")

    async def _open(self, path: str) -> Overlay:
        check_room(self._opened + 1, self._sources.count)
        name = os.path.basename(path)
        if stat.S_ISLNK(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode):
            raise BadOverlay(f"{path}: is a symbolic link; name the overlay itself")
        await check_settled(path, self._fd, came=self._scanned_before)
        journals = self._options.journal_folder
        try:
            return await open_overlay(
                path, writable=not self._options.read_only, journal_folder=journals, dir_fd=self._fd
            )
        except UsageError as exc:
            cause = exc.__cause__
            refused = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
            if self._options.read_only or not refused:
                raise
        overlay = await open_overlay(path, writable=False, journal_folder=journals, dir_fd=self._fd)
        log.warning("%s: is not writable; it is served read-only, nothing that is fetched is kept", path)
        return overlay

    async def _run(self, served: Served) -> None:
        """The tasks of one image: counting, committing, streaming."""
        image, job = served.image, served.job
        if image is None or job is None:
            return
        with served.scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(image.run)
                    nursery.start_soon(self._inspect, image, job, served)
                    nursery.start_soon(replay, image, self._options.profile)
                    try:
                        await image.overlay.count_missing()
                    except QedfsError as exc:
                        # The image goes on being read, written and committed as far as it can be.
                        job.fail(exc)
                    if image.overlay.damage is not None and job.error is None:
                        job.fail(image.overlay.damage)
                    if job.state is not State.COMPLETE:
                        await job.run()
                        await self._let_go(image)
            except* QedfsError as group:
                error = QedfsError("; ".join(str(exc) for exc in group.exceptions))
                image.condition.note(Cause.INTERNAL_ERROR, error)
                log.error("%s: %s", served.name, error)
            except* Exception as group:
                # A fault of ours must cost this image's stream only, not every image of the mount.
                image.condition.note(Cause.INTERNAL_ERROR, QedfsError("internal error, see the log"))
                log.error("%s: internal error", served.name, exc_info=group)

    async def _inspect(self, image: Image, job: StreamJob, served: Served) -> None:
        """Notice what others do to the file, until it is no longer what was opened; then it is not complete either."""
        while True:
            await trio.sleep(INSPECT_SECONDS)
            try:
                await image.overlay.inspect()
                self._check_place(served)
            except BadOverlay as exc:
                if image.overlay.damage is None:
                    image.condition.note(Cause.REPLACED, exc)
                job.fail(exc)
                return
            except QedfsError as exc:
                # The disk, or a file server that is away: it proves nothing, and whoever reads meets it too.
                log.debug("%s: cannot be looked at: %s", image.name, exc)

    def _check_place(self, served: Served) -> None:
        """Raise BadOverlay if the single overlay's path leads to another file. (A folder takes that one up instead.)

        Whoever waits for the image means the file that has the name. One that was removed is legal: it lives for as
        long as it is mounted.
        """
        if not self._single or served.status is None:
            return
        try:
            found = os.stat(os.path.basename(self.source), dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return
        if not _is_file_of(served, found):
            fate = "has another name" if served.status().st_nlink else "ends with the mount"
            raise BadOverlay(
                f"{served.path}: is another file now; what is mounted is the one that was there, which {fate}"
            )

    async def _let_go(self, image: Image) -> None:
        """Drop the connections to the source of an image that needs it no longer, if no other one does."""
        if image.fetch is None:
            return
        remote = image.fetch.remote
        images = [served.image for served in self._by_inode.values() if served.image is not None]
        if not any(one.fetch is not None and one.fetch.remote is remote and not one.complete for one in images):
            await self._sources.let_go(remote)

    async def _remove(self, served: Served) -> None:
        """Take an overlay off the list. Who has it open keeps reading and writing until the last close."""
        del self._by_path[served.path]
        self._by_name.pop(served.name, None)
        if served.image is not None:
            self.on_gone(served)
        served.gone = True
        await self.drop_if_unused(served)

    async def drop_if_unused(self, served: Served) -> None:
        """Close an image whose overlay has left the folder, once nobody has it open."""
        if not served.gone or served.opens:
            return
        self._by_inode.pop(served.inode, None)
        served.scope.cancel()
        self._closing += 1
        try:
            deleted = _is_deleted(served)
            if (error := await _closed(served)) and not deleted:
                self._lost.append(error)
            if served.image is not None:
                await self._let_go(served.image)
        finally:
            self._closing -= 1

    async def close(self) -> list[QedfsError]:
        """Flush and close every overlay, then drop the connections.

        Returns why what was written may not be in the overlays, for each that was closed in this mount, now or before.
        """
        places = trio.CapacityLimiter(CLOSING)

        async def close(served: Served) -> None:
            async with places:
                served.scope.cancel()
                if error := await _closed(served):
                    self._lost.append(error)

        async with trio.open_nursery() as nursery:
            for served in {*self._by_path.values(), *self._by_inode.values()}:
                nursery.start_soon(close, served)
        await self._sources.aclose()
        os.close(self._fd)
        return self._lost


def _image_name(path: str) -> str:
    return os.path.basename(path).removesuffix(SUFFIX) + ".raw"


def _is_file_of(served: Served, found: os.stat_result) -> bool:
    """Whether this is the file that an image is open on."""
    try:
        ours = served.status() if served.status is not None else None
    except QedfsError:
        return False  # its file server is gone, say: that is its own trouble
    return ours is not None and (ours.st_dev, ours.st_ino) == (found.st_dev, found.st_ino)


def _may_pass(exc: QedfsError | OSError) -> bool:
    """Whether another look may find it otherwise, without a change of the file that could be seen."""
    cause = exc if isinstance(exc, OSError) else exc.__cause__
    return isinstance(exc, (InUse, NoMemory)) or (isinstance(cause, OSError) and cause.errno in _PASSING)


def _is_deleted(served: Served) -> bool:
    """Whether nobody can want what an overlay holds: its file has no name any more."""
    try:
        return served.status is not None and served.status().st_nlink == 0
    except QedfsError:
        return False


async def _closed(served: Served) -> QedfsError | None:
    """Close an image; returns why what was written last may not be in the overlay."""
    if served.image is None:
        return None
    try:
        with trio.CancelScope(shield=True):
            await served.image.close()
    except QedfsError as exc:
        log.error("%s: %s", served.name, exc)
        return exc
    except Exception:
        # The others have to be flushed and closed all the same.
        log.exception("%s: cannot be closed", served.name)
        return QedfsError(f"{served.name}: cannot be closed: internal error, see the log")
    return None
