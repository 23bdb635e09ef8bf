"""The FUSE session with the kernel: mounts our file system, answers requests, unmounts.

Owns pyfuse3's init, main loop and close, and the check whether the file system at the mountpoint is still ours. Must
not know what is served, nor why the mount ends.
"""

from __future__ import annotations

import contextlib
import logging
import os

import pyfuse3
import trio

from qedfs.errors import QedfsError
from qedfs.mount import fuse_wait
from qedfs.mount.fuse_init import MAX_BACKGROUND
from qedfs.mount.libfuse_words import caught_words
from qedfs.mount.more_operations import Handlers, MoreOperations
from qedfs.mount.mountpoint import MountInfo, is_dead, mount_info_at, unmount, why_not_mounted

log = logging.getLogger(__name__)

FORCED_SECONDS = 0.2  # for umount -f to unmount after it has aborted the connection
# Concurrent requests of all images: those that wait for a dead source must not block the others. More than the kernel
# has reads in flight, since it does not bound the number of other requests, like lookup, getattr and write.
MAX_TASKS = 2 * MAX_BACKGROUND
MIN_TASKS = 16  # idle workers; with fewer, pyfuse3 starts and ends a task for every request


class FileSystem(pyfuse3.Operations, Handlers):
    """What answers the requests: pyfuse3's handlers, and ours."""


class FuseSession:
    """Our file system at one mountpoint. After `mount`, run `answer`, and call `end` in any case."""

    def __init__(self, mountpoint: str) -> None:
        # Resolved before the mount: afterwards this would send a request to ourselves.
        self.mountpoint = os.path.realpath(mountpoint)
        self._mounted: MountInfo | None = None  # our file system, once it is mounted
        self._more: MoreOperations | None = None
        self._ended = False  # the kernel's connection: what is mounted there now is dead, or is not ours

    @property
    def device(self) -> str:
        """The device number of our file system in the kernel's tables of mounts.

        "" if the tables cannot be read, and after the end of the session, when another mount may have got the number.
        """
        return "" if self._mounted is None or self._ended else self._mounted.device

    @property
    def is_mounted(self) -> bool:
        """Whether our file system is mounted at the mountpoint, and nothing on top of it."""
        if self._mounted is None or self._found() != self._mounted:
            return False
        # After the end a new mount of the same overlays may look the same in the table, and it is alive.
        return not self._ended or is_dead(self.mountpoint)

    def _found(self) -> MountInfo | None:
        try:
            return mount_info_at(self.mountpoint)
        except (OSError, ValueError, LookupError) as exc:  # an unreadable table must not keep a mount from ending
            log.warning(
                "%s: the table of mounts cannot be read, so nobody knows what is mounted there: %s",
                self.mountpoint,
                exc,
            )
            return None

    @property
    def without_more(self) -> str:
        """Why lseek(SEEK_DATA) and fallocate are not answered; "" if they are. See `more_operations.py`."""
        return self._more.missing if self._more is not None else "the file system is not mounted yet"

    def mount(self, operations: FileSystem, source: str, *, allow_other: bool, read_only: bool) -> None:
        """Mount the file system. `source`: shown in the kernel's table of mounts.

        Raises:
            QedfsError: the kernel or libfuse refuses; nothing is mounted.
        """
        fuse_wait.install()
        # Commas separate options there.
        name = source.encode("ascii", "replace").decode().replace(",", "?").replace("\\", "?")
        options = {f"fsname={name}", "subtype=qedfs", "default_permissions", "nosuid", "nodev"}
        if allow_other:
            options.add("allow_other")
        if read_only:
            options.add("ro")
        before = self._found()
        words: list[str] = []
        try:
            self._more = MoreOperations(operations)
            with self._more.offered(), caught_words() as words:
                pyfuse3.init(operations, self.mountpoint, options)
            for line in words:
                log.warning("%s", line)
            self._mounted = self._found()
        except BaseException as exc:
            # It may be mounted all the same: fusermount3 mounts before it passes the descriptor, which can fail. After
            # our end that would be a dead mount; until then it hangs, so it must not be asked anything.
            if self._found() != before:
                self._unmount_lazily()
            if not isinstance(exc, RuntimeError):
                raise
            why = why_not_mounted(self.mountpoint, "; ".join(words))
            raise QedfsError(f"cannot mount on {self.mountpoint}: {why}") from exc

    async def answer(self) -> QedfsError | None:
        """Answer requests until the file system is unmounted from outside, or its connection to the kernel is cut.

        Returns the error if it was cut and the mount is still there.
        """
        async with self._more.serving() if self._more is not None else contextlib.nullcontext():
            await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
        self._ended = True
        if self.is_mounted:
            # umount -f cuts the connection first, and unmounts a moment later unless somebody has a file open.
            await trio.sleep(FORCED_SECONDS)
        if not self.is_mounted:
            return None
        return QedfsError(
            f"{self.mountpoint}: its connection to the kernel was cut, by umount -f or through "
            "/sys/fs/fuse/connections; the mount is taken away"
        )

    def end(self) -> None:
        """Unmount, unless another file system is mounted at the path: libfuse would unmount that one."""
        if not self.is_mounted and self._found() is not None:
            log.warning("%s: another file system is mounted there now; it is left alone", self.mountpoint)
        # If the table could not be read, unmount: a mount that stays would be dead.
        pyfuse3.close(unmount=self._mounted is None or self.is_mounted)
        # libfuse does not unmount if the connection was aborted.
        if self.is_mounted and is_dead(self.mountpoint):
            self._unmount_lazily()

    def _unmount_lazily(self) -> None:
        done = unmount(self.mountpoint, lazy=True)
        if done.returncode:
            log.error("%s: cannot be unmounted: %s", self.mountpoint, done.stderr.strip())
