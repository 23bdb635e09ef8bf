"""The FUSE session with the kernel: mounts our file system, or takes it over, answers requests, unmounts.

Owns pyfuse3's init, main loop and close, and the check whether the file system at the mountpoint is still ours. Must
not know what is served, nor why the mount ends.

While a holder keeps the mount (`holder.py`), no thread of this process may wait for the mount: not for a request of
its own, and not in a notification, which waits for requests of others. The kernel would wait for our answer even after
SIGKILL, so this process could not die, and no other server could get the overlays.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import pyfuse3
import trio

from qedfs.errors import QedfsError
from qedfs.host.runtime import place_of
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
DRAIN_SECONDS = 0.2  # for requests in flight to be answered before the next server gets them


class FileSystem(pyfuse3.Operations, Handlers):
    """What answers the requests: pyfuse3's handlers, and ours."""


class FuseSession:
    """Our file system at one mountpoint. After `mount`, run `answer`, and call `end` in any case."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = place_of(mountpoint)
        self._mounted: MountInfo | None = None  # our file system, once it is mounted
        self._more: MoreOperations | None = None
        self._ended = False  # the kernel's connection: what is mounted there now is dead, or is not ours
        self._taken = False  # it was mounted by an earlier server, and a holder keeps it
        self._leaves = False  # the next server gets it
        self._answered = trio.Event()

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

    @property
    def mounted(self) -> MountInfo | None:
        """Our file system in the kernel's table of mounts; None if it is not known."""
        return self._mounted

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

    def mount(
        self,
        operations: FileSystem,
        source: str,
        *,
        allow_other: bool,
        read_only: bool,
        done: Callable[[int, bytes], None] | None = None,
    ) -> None:
        """Mount the file system. `source`: shown in the kernel's table of mounts.

        `done`: called with the descriptor of /dev/fuse and the kernel's first request, when that was answered.

        Raises:
            QedfsError: the kernel or libfuse refuses; nothing is mounted.
        """
        fuse_wait.install(done)
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

    def take_over(
        self,
        operations: FileSystem,
        fd: int,
        mounted: MountInfo,
        replay: bytes,
        done: Callable[[int, bytes], None] | None = None,
    ) -> None:
        """Serve a file system that is mounted already. `fd` is /dev/fuse, which is closed at the end.

        `replay`: the kernel's first request. `done`: as for `mount`; requests are answered from then on.

        Raises:
            QedfsError: libfuse refuses.
        """
        fuse_wait.install(done, replay=replay)
        self._more = MoreOperations(operations)
        self._mounted, self._taken = mounted, True
        try:
            with self._more.offered(), caught_words() as words:
                pyfuse3.init(operations, f"/dev/fd/{fd}", {"fsname=qedfs"})
        except RuntimeError as exc:
            raise QedfsError(f"cannot take over {self.mountpoint}: {'; '.join(words)}") from exc

    @property
    def breaks_off(self) -> bool:
        """Whether requests that are broken off get no answer, because the kernel sends them to the next server."""
        return self._more is not None and self._more.leaves

    @breaks_off.setter
    def breaks_off(self, value: bool) -> None:
        if self._more is not None:
            self._more.leaves = value

    def abandon(self) -> None:
        """Close everything after an error in this server, and leave the mount to the next one."""
        self._leaves = True
        self.end()

    async def leave(self, *, wait: bool) -> None:
        """Stop to read requests, so that `answer` returns. After that the mount is left to the next server.

        `wait`: until all requests are answered. Otherwise what takes longer than DRAIN_SECONDS is broken off, because
        the kernel sends it to the next server.
        """
        self._leaves = True
        if self._more is not None:
            self._more.leaves = True
        pyfuse3.terminate()
        with trio.move_on_after(float("inf") if wait else DRAIN_SECONDS):
            await self._answered.wait()

    async def answer(self) -> QedfsError | None:
        """Answer requests until the file system is unmounted from outside, or its connection to the kernel is cut.

        Returns the error if it was cut and the mount is still there.
        """
        async with self._more.serving() if self._more is not None else contextlib.nullcontext():
            await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
        self._answered.set()
        if self._leaves:
            return None
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
        if self._leaves:
            pyfuse3.close(unmount=False)
            return
        if not self.is_mounted and self._found() is not None:
            log.warning("%s: another file system is mounted there now; it is left alone", self.mountpoint)
        if self._taken:
            # libfuse does not know where it is mounted.
            if self.is_mounted:
                self._unmount_lazily()
            pyfuse3.close(unmount=False)
            return
        # If the table could not be read, unmount: a mount that stays would be dead.
        pyfuse3.close(unmount=self._mounted is None or self.is_mounted)
        # libfuse does not unmount if the connection was aborted.
        if self.is_mounted and is_dead(self.mountpoint):
            self._unmount_lazily()

    def _unmount_lazily(self) -> None:
        done = unmount(self.mountpoint, lazy=True)
        if done.returncode:
            log.error("%s: cannot be unmounted: %s", self.mountpoint, done.stderr.strip())
