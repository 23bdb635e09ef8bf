"""Snapshots: copies of the overlay of an image that is in use, as it is at one moment, which share its blocks.

Owns the order of the steps, and what becomes of a copy that fails. `overlay/stillness.py` stops the writes. Must not
know commands.

1. A file without a name is made in the folder of the copy, so that a kill leaves nothing behind.
2. In a still moment it gets the blocks of the overlay (FICLONE). The file system does this at once, whatever has been
   written; without that the guest would stand still for as long as a copy takes, so it is refused. A file system that
   hangs gets SHARE_SECONDS, which is less than a guest's disk driver waits for an answer. Then the snapshot has failed
   and guests write on. The call cannot be cancelled. When it returns, it may have shared blocks that were written
   meanwhile, but the file never gets a name: it goes with its last descriptor, which the thread of the call closes.
3. Guests write on. The session is ended in the copy, which is made durable.
4. The copy gets its name, unless there is such a file, and the name is made durable. After the content: a power cut
   must not leave a name with a part of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

import trio

from qedfs.errors import InStandby, InUse, NoMemory, NoSpace, QedfsError, UsageError, file_error
from qedfs.host.durable import sync_folder
from qedfs.image.image import Image
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.served import Served
from qedfs.overlay.create import already_exists
from qedfs.overlay.session_copy import end_session
from qedfs.overlay.storage import FileStorage
from qedfs.source.url import parse_location

_FICLONE = 0x40049409  # ioctl_ficlone(2)
SHARE_SECONDS = 15.0  # with many pieces, XFS takes a second for a million of them
_MOST_LINKS = 40  # in one path, as the kernel follows (path_resolution(7))
_CANNOT_SHARE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM})


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy that was made. `pause_seconds`: how long writes have waited for it."""

    file: str
    pause_seconds: float


class Snapshots:
    """The snapshots of one mount."""

    def __init__(self, folder: OverlayFolder) -> None:
        self._folder = folder
        self._hanging: set[str] = set()  # overlays whose blocks the kernel has been told to share, and has not yet

    async def take(self, served: Served, file: str, *, mountpoint: str) -> Snapshot:
        """Copy the overlay of an image to `file`, an absolute path outside `mountpoint`, durably.

        Raises:
            UsageError: there is a file already, or the folder is not there.
            InStandby: the overlay holds nothing that could be copied.
            NoSpace: the file system has no room for the copy.
            InUse: it is being committed into its backing.
            QedfsError: the file system cannot share blocks between the two, or the overlay cannot be flushed.
        """
        _check_place(file, mountpoint)
        async with served.cut_over:  # so that the image keeps its overlay
            image = _image(served)
            if served.path in self._hanging:
                raise _hangs(file, "is still waiting for an earlier copy of this overlay")
            overlay = image.overlay
            if overlay.record.committing and image.version is not None:
                await image.source_size()  # a commit was interrupted; from this check on the copy has a whole pin
            await trio.to_thread.run_sync(_check_folder, overlay.backing, self._folder.root, file, mountpoint)
            with _errors(file):
                return await self._take(served, image, file)

    async def _take(self, served: Served, image: Image, file: str) -> Snapshot:
        overlay = image.overlay
        run = trio.to_thread.run_sync  # a call that has begun is not abandoned, except in `_share`
        source = await run(lambda: self._open_source(served))
        target = -1
        try:
            target = await run(lambda: _unnamed(file, stat.S_IMODE(overlay.file_status().st_mode)))
            async with overlay.still() as since:
                await self._share(source, target, served.path, file)
                _check_not_committed(served, image)  # again, as it may have begun meanwhile
                modified_ns, changed_ns = overlay.times.modified_ns, overlay.times.changed_ns
                pause = trio.current_time() - since
            copy = FileStorage(os.dup(target), file, writable=True)
            try:
                await run(lambda: end_session(copy, modified_ns=modified_ns, changed_ns=changed_ns))
            finally:
                copy.close()
            await run(lambda: _name(target, file))
        finally:
            with trio.CancelScope(shield=True):
                # Not on the event loop: the close of a copy that got no name drops all its blocks.
                await run(lambda: _close(source, target))
        return Snapshot(file, pause)

    async def _share(self, source: int, target: int, overlay: str, file: str) -> None:
        """Step 2. Raises QedfsError after SHARE_SECONDS, too."""
        # Descriptors of its own: ours are closed, and their numbers used again, before a call that hangs returns.
        mine = _both(source, target)
        begun = False

        def share() -> None:
            nonlocal begun
            begun = True
            try:
                _share(*mine, file)
            finally:
                _close(*mine)
                self._hanging.discard(overlay)

        self._hanging.add(overlay)
        try:
            with trio.move_on_after(SHARE_SECONDS) as scope:
                # A limiter of its own: a call that hangs must not take one of the threads of all others.
                await trio.to_thread.run_sync(share, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        except RuntimeError as exc:  # of threading
            if begun:
                raise
            _close(*mine)
            self._hanging.discard(overlay)
            raise NoMemory(f"{file}: is not made: no thread can be started for it") from exc
        if scope.cancelled_caught:
            raise _hangs(file, f"has not shared the blocks within {SHARE_SECONDS:g} s")

    def _open_source(self, served: Served) -> int:
        """The overlay's file through a descriptor of our own, as the other one belongs to its storage."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(os.path.basename(served.path), flags, dir_fd=self._folder.fd)
        if not served.is_on(os.fstat(fd)):
            os.close(fd)
            raise QedfsError(f"{served.path}: is another file now")
        return fd


def _image(served: Served) -> Image:
    image = served.image
    if image is None or served.removed:
        raise QedfsError(f"{served.name}: is not served")
    if image.in_standby:
        raise InStandby(f"{served.name}: is in standby, so that its overlay holds nothing to copy")
    if not image.writable:
        # Without a session nothing changes the file, and whoever may read it can copy it.
        raise QedfsError(f"{served.name}: is not written to by this mount; cp --reflink {served.path} copies it")
    _check_not_committed(served, image)
    return image


def _check_not_committed(served: Served, image: Image) -> None:
    """Raise InUse while the backing is written to.

    The copy would lack what a guest writes from now on, and read it from the backing all the same. It would know the
    backing by samples only, so that it would not notice.
    """
    if image.committing_down:
        raise InUse(f"{served.name}: is being committed into its backing; qedfs commit --cancel ends that")


def _check_place(file: str, mountpoint: str) -> None:
    if not os.path.isabs(file):
        raise UsageError(f"{file}: is not an absolute path")
    if os.path.join(os.path.normpath(file), "").startswith(os.path.join(mountpoint, "")):
        raise _inside(file)


def _inside(file: str) -> UsageError:
    return UsageError(f"{file}: is inside the mount; a snapshot is an overlay, and belongs beside the others")


def _check_folder(backing: str | None, here: str, file: str, mountpoint: str) -> None:
    """Raise UsageError if links lead to the mount, or the copy would look for its backing elsewhere than in `here`.

    `here`: the folder of the overlay, without symbolic links. Waits for the file systems that the path leads through,
    but not for our own mount: a server that is killed during such a wait could not end, and none would follow it.
    """
    there = _resolved(os.path.dirname(file), file, mountpoint)
    if backing is None or here == there:
        return
    if parse_location(backing, relative_to=here) != parse_location(backing, relative_to=there):
        raise UsageError(f"{file}: the backing {backing} is relative to the folder of the overlay, {here}")


def _resolved(folder: str, file: str, mountpoint: str) -> str:
    """The folder without symbolic links, as os.path.realpath. Raises UsageError before it looks into the mount."""
    left = folder.split("/")[::-1]
    found, links = "/", 0
    while left:
        found = os.path.normpath(os.path.join(found, left.pop()))  # without links so far, so ".." may be left out
        if found == mountpoint:
            raise _inside(file)
        with contextlib.suppress(OSError):  # no link, or not there, which the open of the folder tells
            target = os.readlink(found)
            links += 1
            if links > _MOST_LINKS:
                raise UsageError(f"{file}: {os.strerror(errno.ELOOP)}")
            left += [*target.split("/")[::-1], "/" if target.startswith("/") else ".."]
    return found


@contextlib.contextmanager
def _errors(file: str) -> Iterator[None]:
    """Translate the errors of the copy."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{file}: the file system is full") from exc
        raise file_error(f"{file}: cannot be written: {exc.strerror}", exc) from exc


def _unnamed(file: str, mode: int) -> int:
    """A file without a name in the folder of `file`. Raises UsageError if there is such a file."""
    if os.path.lexists(file):
        raise already_exists(file)
    try:
        fd = os.open(os.path.dirname(file), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        # EISDIR: a kernel or a file system that does not know O_TMPFILE. Those that share blocks know it.
        raise (_cannot_share(file) if exc.errno in (errno.EOPNOTSUPP, errno.EISDIR) else exc) from exc
    os.fchmod(fd, mode)
    return fd


def _share(source: int, target: int, file: str) -> None:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as exc:
        if exc.errno in _CANNOT_SHARE:
            raise _cannot_share(file) from exc
        raise


def _hangs(file: str, what: str) -> QedfsError:
    return QedfsError(f"{file}: is not made: the file system {what}; guests write on, and no copy is left")


def _cannot_share(file: str) -> QedfsError:
    return QedfsError(
        f"{file}: cannot share blocks with the overlay: that takes one file system for both, XFS with reflink or Btrfs;"
        " qedfs export copies the image while nobody writes to it"
    )


def _both(source: int, target: int) -> tuple[int, int]:
    """Another descriptor for each."""
    other = os.dup(source)
    try:
        return other, os.dup(target)
    except OSError:
        os.close(other)
        raise


def _close(*descriptors: int) -> None:
    for fd in descriptors:
        if fd >= 0:
            os.close(fd)


def _name(fd: int, file: str) -> None:
    """Step 4."""
    os.fsync(fd)  # the mode as well, which a barrier leaves out
    try:
        # With a descriptor of a folder, which an absolute path does not need, link() follows the symbolic link.
        os.link(f"/proc/self/fd/{fd}", file, src_dir_fd=fd, follow_symlinks=True)
    except FileExistsError as exc:
        raise already_exists(file) from exc
    sync_folder(os.path.dirname(file))
