"""Which overlays are served, under which names and inodes: the folder, or the one file, that was mounted.

Owns the list of what was found, and the look into the folder that keeps it up to date. Must not know FUSE requests, how
an overlay is opened, nor what runs for it. A file that cannot be served costs itself only: it is kept in the list with
the reason, for the log and for `status`.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Callable

import trio

from qedfs.errors import InUse, NoMemory, QedfsError, UsageError
from qedfs.image.condition import Cause, Trouble
from qedfs.mount.opener import Opener
from qedfs.mount.overlay_folder import SUFFIX, OverlayFolder
from qedfs.mount.served import Served
from qedfs.mount.settling import settling
from qedfs.mount.supervisor import Supervisor

log = logging.getLogger(__name__)

RESCAN_SECONDS = 1.0
# Of this machine or of a file server, not of the file. EAGAIN: somebody has a lease on it.
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN}
)
_UNSEEN = (0, 0, 0)  # what no file looks like: one that can be looked at later has changed


class Registry:
    """The overlays of one mount, by path, and the images of those that can be served, by name and by inode."""

    def __init__(
        self, folder: OverlayFolder, opener: Opener, supervisor: Supervisor, forget: Callable[[str], None]
    ) -> None:
        """`forget`: told the name of an image that is no longer there, which the kernel may still know."""
        self._folder = folder
        self._opener = opener
        self._supervisor = supervisor
        self._forget = forget
        self._by_path: dict[str, Served] = {}
        self._by_name: dict[str, Served] = {}
        self._by_inode: dict[int, Served] = {}
        self._inodes = itertools.count(2)  # 1 is the root
        self._scanning = trio.Lock()
        self._scanned_mtime = -1
        self._scanned_before = False

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

    def known(self) -> set[Served]:
        """All that was found, and the images whose overlay has left the folder while somebody has them open."""
        return {*self._by_path.values(), *self._by_inode.values()}

    @property
    def in_use(self) -> bool:
        """Whether anybody has an image open, or one is being closed; also of an overlay that has left the folder."""
        return bool(self._supervisor.ending) or any(served.opens for served in self._by_inode.values())

    # Looking.

    async def watch(self) -> None:
        """Notice overlays that come and go, until cancelled.

        A look costs one fstat while the folder does not change and all are served.
        """
        while True:
            await trio.sleep(RESCAN_SECONDS)
            try:
                await self.rescan(broken=True)
            except (OSError, QedfsError) as exc:
                log.warning("cannot look into %s: %s", self._folder.source, exc)

    async def rescan(self, *, broken: bool = False) -> bool:
        """Look again if the folder has changed; returns whether it did look.

        `broken`: also if there are overlays that could not be served. A file that is repaired in place, and one that
        its other user has closed, leave no trace in the folder.
        """
        changed = self._folder.stat().st_mtime_ns != self._scanned_mtime
        if self._folder.single or not (changed or (broken and self._any_broken())):
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
        if self._folder.single:
            return
        try:
            await self.scan()
        except OSError as exc:
            raise QedfsError(f"{self._folder.source}: cannot be looked into: {exc.strerror}") from exc

    async def scan(self) -> None:
        """Bring the list up to date with the folder. A single overlay that cannot be served raises its QedfsError."""
        async with self._scanning:
            # Taken first: what comes while we look is looked for the next time.
            self._scanned_mtime = self._folder.stat().st_mtime_ns
            try:
                await self._scan()
            except BaseException:
                self._scanned_mtime = -1  # what was not come to has to be looked for again
                raise
            self._scanned_before = True

    async def _scan(self) -> None:
        self._opener.renew_patience()
        found = dict(self._folder.overlays())
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
                self._supervisor.start(served)

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
        return await self._add(path, seen, known.refusal if known else None)

    def _note_unseen(self, path: str, error: OSError) -> None:
        """A file is there and cannot be looked at. An image that is served goes on: it has its own descriptor."""
        known = self._by_path.get(path)
        if known is None or known.image is None:
            unseen = Served(_image_name(path), path, next(self._inodes), _UNSEEN)
            self._refuse(unseen, UsageError(f"{path}: {error.strerror}"), known.refusal if known else None)
            self._by_path[path] = unseen

    # Coming and going.

    async def _add(self, path: str, seen: tuple[int, int, int], before: Trouble | None) -> Served | None:
        """Open an overlay. `before`: why it could not be opened the last time, which the log has."""
        name = _image_name(path)
        served = Served(name, path, next(self._inodes), seen)
        try:
            self._check_not_ours(path)
            served.image, served.job = await self._opener.open(path, name, came=self._scanned_before)
        except (QedfsError, OSError) as exc:
            if self._folder.single:
                raise
            served.passing = _may_pass(exc)
            # OSError: the file went away, or its file system did, while we looked at it.
            self._refuse(served, exc if isinstance(exc, QedfsError) else UsageError(f"{path}: {exc.strerror}"), before)
        self._by_path[path] = served
        if served.image is None:
            return None
        self._by_name[name] = self._by_inode[served.inode] = served
        return served

    def _refuse(self, served: Served, error: QedfsError, before: Trouble | None) -> None:
        """Note why an overlay is not served, and log it unless the log has it from `before`."""
        since = time.time() if before is None else before.since
        served.refusal = Trouble(Cause.NOT_SERVED, error.fresh(), since)
        text = str(error)
        if before is None or text != str(before.error):
            log.error("not served: %s", text if text.startswith(served.path) else f"{served.path}: {text}")

    def _check_not_ours(self, path: str) -> None:
        """Raise InUse if this mount has the file open under another name: one inode is one image."""
        found = self._folder.lstat(path)
        for other in self._by_inode.values():
            if not other.is_on(found):
                continue
            name = os.path.basename(other.path)
            if other.gone:
                text = f"was {name}, whose image {other.name} somebody still has open; it is served when that is closed"
            else:
                text = f"is the same file as {name}, which is served as {other.name}"
            raise InUse(f"{path}: {text}")

    async def _remove(self, served: Served) -> None:
        """Take an overlay off the list. Who has it open keeps reading and writing until the last close."""
        del self._by_path[served.path]
        self._by_name.pop(served.name, None)
        if served.image is not None:
            self._forget(served.name)
        served.gone = True
        await self.drop_if_unused(served)

    async def drop_if_unused(self, served: Served) -> None:
        """Close an image whose overlay has left the folder, once nobody has it open."""
        if not served.gone or served.opens:
            return
        self._by_inode.pop(served.inode, None)
        await self._supervisor.end(served)


def _image_name(path: str) -> str:
    return os.path.basename(path).removesuffix(SUFFIX) + ".raw"


def _may_pass(exc: QedfsError | OSError) -> bool:
    """Whether another look may find it otherwise, without a change of the file that could be seen."""
    cause = exc if isinstance(exc, OSError) else exc.__cause__
    return isinstance(exc, (InUse, NoMemory)) or (isinstance(cause, OSError) and cause.errno in _PASSING)
