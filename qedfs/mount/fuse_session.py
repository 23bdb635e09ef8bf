"""The session with the kernel: our file system at one mountpoint, from the mount to its end, whoever ends it.

Owns pyfuse3's start, its loop and its end, and the knowledge whether what stands at the mountpoint is still ours. Must
not know what is served, nor why the mount ends.
"""

from __future__ import annotations

import logging
import os

import pyfuse3
import trio

from qedfs.errors import QedfsError
from qedfs.mount import fuse_wait
from qedfs.mount.fuse_init import MAX_BACKGROUND
from qedfs.mount.mountpoint import MountInfo, is_dead, mount_info_at, unmount, why_not_mounted

log = logging.getLogger(__name__)

FORCED_SECONDS = 0.2  # from the cut of the connection to the end of the mount by umount -f
# Requests in work at once over all images: those that wait for a dead source must not keep others from being read. More
# than the kernel has of reads in flight: the others, like names, attributes and writes, it sends without a bound.
MAX_TASKS = 2 * MAX_BACKGROUND
MIN_TASKS = 16  # idle workers kept: below, pyfuse3 starts and ends a task per request


class FuseSession:
    """Our file system at one mountpoint: `mount`, then `answer`, and in any case `end`."""

    def __init__(self, mountpoint: str) -> None:
        # Looked up now: once mounted, a look at the mountpoint is a request to ourselves.
        self.mountpoint = os.path.realpath(mountpoint)
        self._mounted: MountInfo | None = None  # our file system, once it is mounted
        self._ended = False  # the kernel's connection: what is mounted there now is dead, or is not ours

    @property
    def device(self) -> str:
        """The device number of our file system in the kernel's tables of mounts.

        "" if the tables cannot be read, and after the end of the session, when another mount may have got the number.
        """
        return "" if self._mounted is None or self._ended else self._mounted.device

    @property
    def stands(self) -> bool:
        """Whether the mountpoint shows our file system."""
        if self._mounted is None or self._found() != self._mounted:
            return False
        # After the end a new mount of the same overlays may look the same in the table, and it is alive.
        return not self._ended or is_dead(self.mountpoint)

    def _found(self) -> MountInfo | None:
        try:
            return mount_info_at(self.mountpoint)
        except (OSError, ValueError, LookupError) as exc:  # whatever is in the table, a mount must come to its end
            log.warning("cannot look what is mounted at %s: %s", self.mountpoint, exc)
            return None

    def mount(self, operations: pyfuse3.Operations, source: str, *, allow_other: bool, read_only: bool) -> None:
        """Mount. `source`: a path for the kernel's table of mounts.

        Raises:
            QedfsError: the kernel or libfuse refuses. Nothing is mounted then.
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
        try:
            pyfuse3.init(operations, self.mountpoint, options)
            self._mounted = self._found()
        except BaseException as exc:
            # The kernel may have mounted it all the same: fusermount3 has, when we cannot take its descriptor. Without
            # us it would be a dead mount, and with us one that hangs: hence no question to it.
            if self._found() != before:
                self._take_away()
            if not isinstance(exc, RuntimeError):
                raise
            why = why_not_mounted(self.mountpoint, allow_other=allow_other)
            raise QedfsError(f"cannot mount on {self.mountpoint}: {why}") from exc

    async def answer(self) -> QedfsError | None:
        """Answer requests until the file system is unmounted from outside, or its connection to the kernel is cut.

        Returns the error if it was cut and the mount is still there.
        """
        await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
        self._ended = True
        if self.stands:
            # umount -f cuts the connection first, and unmounts a moment later unless somebody has a file open.
            await trio.sleep(FORCED_SECONDS)
        if not self.stands:
            return None
        return QedfsError(
            f"{self.mountpoint}: its connection to the kernel was cut, by umount -f or through "
            "/sys/fs/fuse/connections; the mount is taken away"
        )

    def end(self) -> None:
        """Take our file system away: libfuse unmounts whatever is at the path, and so may do it only if we are."""
        if not self.stands and self._found() is not None:
            log.warning("%s: another file system is mounted there now; it is left alone", self.mountpoint)
        # Where the kernel's table cannot be read nobody can tell; a mount that stays would be a dead one.
        pyfuse3.close(unmount=self._mounted is None or self.stands)
        # libfuse takes a connection that was cut for a mount that is gone.
        if self.stands and is_dead(self.mountpoint):
            self._take_away()

    def _take_away(self) -> None:
        done = unmount(self.mountpoint, lazy=True)
        if done.returncode:
            log.error("%s: cannot be unmounted: %s", self.mountpoint, done.stderr.strip())
