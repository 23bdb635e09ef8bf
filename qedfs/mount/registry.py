"""Which overlays are served, under which names and inodes.

Owns the list of overlays, and the scan of the folder that keeps it up to date. Must not know FUSE requests, how an
overlay is opened, nor which tasks its image has. An overlay that cannot be served does not affect the others: it stays
in the list with the reason, for the log and for `status`.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import trio

from qedfs.errors import Inaccessible, InUse, NoMemory, QedfsError
from qedfs.host.beat import next_beat
from qedfs.image.condition import Cause, Trouble
from qedfs.mount import failed_barriers, stream_orders
from qedfs.mount.inode_numbers import InodeNumbers
from qedfs.mount.opener import Opener
from qedfs.mount.overlay_folder import SUFFIX, OverlayFolder
from qedfs.mount.released import Released
from qedfs.mount.served import Served
from qedfs.mount.settling import settling
from qedfs.mount.supervisor import Supervisor

log = logging.getLogger(__name__)

SCAN_SECONDS = 1.0
# Overlays that are opened at the same time. The two barriers of an opening are nearly all of its time, and the disk
# combines those of several files.
MAX_OPENING = 16
# Errors of this machine or of a file server, not of the file. EAGAIN: a process has a lease on the file.
_TRANSIENT = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN}
)
NO_INODE = 0  # of what is listed without an image
_NO_STAMP = (0, 0, 0)  # no file has it, so a file counts as changed once its attributes can be read


class Candidate(NamedTuple):
    """A file that is to be opened. `before`: why it was refused the last time, which is already in the log."""

    path: str
    stamp: tuple[int, int, int]  # see `Served`
    before: Trouble | None


class Registry:
    """The overlays of one mount, by path, and the images of those that can be served, by name and by inode."""

    def __init__(
        self,
        folder: OverlayFolder,
        opener: Opener,
        supervisor: Supervisor,
        forget: Callable[[str], None],
        numbers: InodeNumbers,
        told: Mapping[str, str],
        released: Released,
    ) -> None:
        """`forget`: called with the name of an image that is removed, which the kernel may have cached.

        `told`: what an earlier server has told of the orders of users (`stream_orders.py`), and of failures.
        `released`: the files that are left alone.
        """
        self._folder = folder
        self._opener = opener
        self._supervisor = supervisor
        self._forget = forget
        self._by_path: dict[str, Served] = {}
        self._sorted: Sequence[Served] | None = None  # all of these by name, if none has come or gone since
        self._by_name: dict[str, Served] = {}
        self._by_inode: dict[int, Served] = {}
        self._by_file: dict[int, list[Served]] = {}  # the same, by the inode number of the overlay file
        self.numbers = numbers
        self.restored: Callable[[Served], None] = lambda _: None  # called with an image that an earlier server had open
        self.added: Callable[[Served], None] = lambda _: None  # called with each image that has come
        self._told = told
        self._released = released
        self._open_now = supervisor.open_now
        self._scanning = trio.Lock()
        self._scanned_mtime = -1
        self._scanned_before = False

    # Queries.

    def by_name(self, name: str) -> Served | None:
        """The served image with this name."""
        return self._by_name.get(name)

    def by_inode(self, inode: int) -> Served | None:
        """The served image with this inode."""
        return self._by_inode.get(inode)

    def listed(self, name: str) -> Served | None:
        """The overlay in the folder whose image has this name, served or not."""
        return next((served for served in self._by_path.values() if served.name == name), None)

    def images(self) -> list[Served]:
        """The served images, in the order in which they were opened."""
        return [served for served in self._by_inode.values() if not served.removed]

    def open_images(self) -> list[Served]:
        """The served images that are open now."""
        return [served for served in self._open_now if not served.removed]

    def everything(self) -> Sequence[Served]:
        """All overlays in the folder, sorted by name, including those that cannot be served.

        The same object as before if none has come or gone since.
        """
        if self._sorted is None:
            self._sorted = sorted(self._by_path.values(), key=lambda served: served.name)
        return self._sorted

    def including_removed(self) -> set[Served]:
        """All overlays in the folder, and the images that are still open after their overlay was removed from it."""
        return {*self._by_path.values(), *self._by_inode.values()}

    @property
    def in_use(self) -> bool:
        """Whether an image is open, even if its overlay was removed, or is being closed because that was removed."""
        return bool(self._supervisor.ending or self._open_now)

    # Scanning.

    async def watch(self) -> None:
        """Look for changes once a second, until cancelled. A look costs one fstat if all overlays are served."""
        while True:
            await next_beat(SCAN_SECONDS)
            try:
                await self.scan_if_changed(retry=True)
            except (OSError, QedfsError) as exc:
                log.warning("cannot look into %s: %s", self._folder.source, exc)

    async def scan_if_changed(self, *, retry: bool = False) -> bool:
        """Scan if the folder has changed. Returns whether it has scanned.

        `retry`: scan also if an overlay could not be served. A repair of the file, or the end of the program that had
        it open, does not change the folder.
        """
        changed = self._folder.stat().st_mtime_ns != self._scanned_mtime
        if self._folder.single or not (changed or (retry and self._any_refused())):
            return False
        await self.scan()
        return True

    def _any_refused(self) -> bool:
        return any(served.image is None for served in self._by_path.values())

    async def rescan(self) -> None:
        """Scan even if the folder seems unchanged, unless a single overlay is mounted.

        Raises:
            QedfsError: the folder cannot be read.
        """
        if self._folder.single:
            return
        try:
            await self.scan()
        except OSError as exc:
            raise QedfsError(f"{self._folder.source}: cannot be looked into: {exc.strerror}") from exc

    async def scan(self) -> None:
        """Bring the list up to date with the folder. Raises QedfsError for a single overlay that cannot be served."""
        async with self._scanning:
            # Read before the folder is listed, so that a change during this scan causes another one.
            self._scanned_mtime = self._folder.stat().st_mtime_ns
            try:
                with self._folder.known():
                    await self._scan()
            except BaseException:
                self._scanned_mtime = -1  # scan again: this one may have missed some
                raise
            self._scanned_before = True

    async def _scan(self) -> None:
        self._opener.begin_scan()
        found = dict(self._folder.overlays())
        for gone in [served for path, served in self._by_path.items() if path not in found]:
            await self._remove(gone)
        self._released.keep_only(one.st_ino for one in found.values() if not isinstance(one, OSError))
        waiting = [one for path, status in found.items() if (one := await self._examine(path, status))]
        added: list[Served] = []
        try:
            await self._add_all(waiting, added)
        finally:
            # All at once: streams share what they fetch, so none should run ahead of the others. And even after an
            # error: an image that is served without its tasks would never be committed.
            for served in sorted(added, key=lambda one: one.path):
                self._supervisor.start(served)

    async def _examine(self, path: str, status: os.stat_result | OSError) -> Candidate | None:
        """Look whether a file is to be opened, because it is new, replaced, or was refused before."""
        if isinstance(status, OSError):
            self._note_unreadable(path, status)
            return None
        if status in self._released:
            return None
        stamp = (status.st_ino, status.st_size, status.st_ctime_ns)
        known = self._by_path.get(path)
        if known is not None and not known.settling:
            replaced = known.image is not None and known.stamp[0] != status.st_ino
            retry = known.image is None and (known.stamp != stamp or known.transient)
            if not replaced and not retry:
                return None
            if replaced:
                await self._remove(known)
            # A refused overlay stays in the list until `_add` replaces it, so that it never disappears from `status`.
        elif self._scanned_before and settling(status):
            self._scanned_mtime = -1  # scan again
            self._list(known or Served(_image_name(path), path, NO_INODE, stamp))
            return None
        return Candidate(path, stamp, known.refusal if known else None)

    def _note_unreadable(self, path: str, error: OSError) -> None:
        """List a file whose attributes cannot be read. An image that is already served continues: its file is open."""
        known = self._by_path.get(path)
        if known is None or known.image is None:
            unreadable = Served(_image_name(path), path, NO_INODE, _NO_STAMP)
            self._refuse(unreadable, Inaccessible(f"{path}: {error.strerror}"), known.refusal if known else None)
            self._list(unreadable)

    # Adding and removing.

    async def _add_all(self, candidates: Sequence[Candidate], added: list[Served]) -> None:
        """Open overlays, up to MAX_OPENING at the same time. Those that are served are appended to `added`."""
        left = iter(candidates)
        links: list[Candidate] = []  # further names of files
        files: set[int] = set()

        async def work() -> None:
            for one in left:
                # After the file itself, so that it is refused with the name under which the file is served.
                if one.stamp[0] in files:
                    links.append(one)
                    continue
                files.add(one.stamp[0])
                if served := await self._add(one):
                    added.append(served)

        if len(candidates) == 1:  # a nursery would wrap the error of a single overlay in a group
            await work()
            return
        async with trio.open_nursery() as nursery:
            for _ in range(min(MAX_OPENING, len(candidates))):
                nursery.start_soon(work)
        added += [served for one in links if (served := await self._add(one))]

    async def _add(self, candidate: Candidate) -> Served | None:
        """Open an overlay and list it."""
        path, stamp, before = candidate
        name = _image_name(path)
        served = Served(name, path, NO_INODE, stamp, open_now=self._open_now, opened=self._supervisor.opened)
        try:
            self._check_not_open(path)
            served.image, served.jobs = await self._opener.open(path, name, is_new=self._scanned_before)
        except (QedfsError, OSError) as exc:
            if self._folder.single:
                raise
            served.transient = _is_transient(exc)
            # OSError: the file or its file system disappeared meanwhile.
            error = exc if isinstance(exc, QedfsError) else Inaccessible(f"{path}: {exc.strerror}")
            self._refuse(served, error, before)
        except Exception:
            # A bug, or no thread is left. It must cost this overlay only, not those that are opened beside it.
            if self._folder.single:
                raise
            if before is None:
                log.exception("%s: internal error", path)
            served.transient = True
            self._refuse(served, QedfsError("internal error, see the log"), before)
        self._list(served)
        if served.image is None:
            return None
        # Not before, as overlays may be opened in another order: readdir goes on after an inode, so new numbers must
        # ascend as the images are listed.
        self.numbers.admit(served)
        failed_barriers.restore(self._told, served)
        await stream_orders.restore(self._told, served)
        self._by_name[name] = self._by_inode[served.inode] = served
        self._by_file.setdefault(stamp[0], []).append(served)
        if served.opens:
            self._open_now.add(served)
            self.restored(served)
        self.added(served)
        return served

    def _list(self, served: Served) -> None:
        self._by_path[served.path] = served
        self._sorted = None

    def _refuse(self, served: Served, error: QedfsError, before: Trouble | None) -> None:
        """Record why an overlay is not served, and log it unless it was logged for `before`."""
        since = time.time() if before is None else before.since
        served.refusal = Trouble(Cause.NOT_SERVED, error.fresh(), since)
        text = str(error)
        if before is None or text != str(before.error):
            log.error("not served: %s", text if text.startswith(served.path) else f"{served.path}: {text}")

    def _check_not_open(self, path: str) -> None:
        """Raise InUse if this mount has the file open under another name."""
        found = self._folder.lstat(path)
        for other in self._by_file.get(found.st_ino, ()):
            if not other.is_on(found):
                continue
            name = os.path.basename(other.path)
            if other.removed:
                text = f"was {name}, whose image {other.name} is still open; it will be served when that is closed"
            else:
                text = f"is the same file as {name}, which is served as {other.name}"
            raise InUse(f"{path}: {text}")

    async def let_go(self, served: Served) -> QedfsError | None:
        """Take an image that nobody has open off the list, and close it. Returns an error if last writes are lost."""
        return await self._remove(served)

    async def _remove(self, served: Served) -> QedfsError | None:
        """Take an overlay off the list. Programs that have its image open can use it until they close it."""
        if served.removed:
            return None
        del self._by_path[served.path]
        self._sorted = None
        self._by_name.pop(served.name, None)
        if served.image is not None:
            self._forget(served.name)
        served.removed = True
        return await self.close_if_unused(served)

    async def close_if_unused(self, served: Served) -> QedfsError | None:
        """Close an image whose overlay was removed, unless it is open. Returns as `let_go`."""
        if not served.removed or served.opens:
            return None
        if self._by_inode.pop(served.inode, None) is not None:
            same = self._by_file[served.stamp[0]]
            same.remove(served)
            if not same:
                del self._by_file[served.stamp[0]]
        self.numbers.forget(served)
        return await self._supervisor.end(served)


def _image_name(path: str) -> str:
    return os.path.basename(path).removesuffix(SUFFIX) + ".raw"


def _is_transient(exc: QedfsError | OSError) -> bool:
    """Whether another attempt may succeed although the file stays the same."""
    cause = exc if isinstance(exc, OSError) else exc.__cause__
    return isinstance(exc, (InUse, NoMemory)) or (isinstance(cause, OSError) and cause.errno in _TRANSIENT)
