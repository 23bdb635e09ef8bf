"""The overlay file as a port: the one holder of its descriptor, and the one place that writes to it.

Owns the descriptor, its locks and the translation of OSError. Knows offsets and bytes; must not know what they mean.

All methods are synchronous and short, except that the disk may make them wait; `in_thread` moves such a call off the
event loop. A recording twin in the tests implements the same `Storage` port.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

import trio

from qedfs.errors import BadOverlay, InUse, NoSpace, QedfsError, ReadOnlyOverlay, UsageError
from qedfs.format.geometry import MAX_FILE_SIZE
from qedfs.host.procfs import TMPFS_TYPES, filesystem_type, outer_user
from qedfs.overlay.length import Length
from qedfs.overlay.pagecache import evict

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

# Threads per overlay: enough to read from a deep disk queue beside all adoptions (`overlay.py`), few enough that one
# stuck disk costs one overlay.
THREADS = 12

# QEMU's image locks (block/file-posix.c): byte 100+i says "I use permission i", 200+i "I do not share it".
_LOCK_USES, _LOCK_UNSHARED = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
# File systems whose leases are those of a server (fs/nfs/nfs4proc.c, fs/smb/client/file.c).
_SERVED_TYPES = frozenset({"nfs", "nfs4", "cifs", "smb3"})
_FLOCK = struct.Struct("hhqqi4x")


class FileExtent(NamedTuple):
    """A part of the file, up to the byte before `end`, that is a hole (and reads as zeros) or may be data."""

    end: int
    hole: bool


class Storage(Protocol):
    """What the overlay needs of its file. Offsets and sizes in bytes. Errors: QedfsError."""

    writable: bool
    locked: bool  # whether nobody else has this very file open for writing, as long as we have it

    @property
    def damage(self) -> BadOverlay | None:
        """What somebody has done to the file while it was open; nothing is written to it any more."""
        ...

    def condemn(self, error: BadOverlay) -> None:
        """The file is another one's now: nothing is written to it, or read from it, any more."""
        ...

    def check_length(self) -> None:
        """Raise BadOverlay if the file is shorter than it must be, or is damaged otherwise."""
        ...

    def name(self) -> str:
        """What names the file in its file system whatever path it has; "" if it has no such name."""
        ...

    def device(self) -> int:
        """What tells the file from one of the same name in another file system; may change while it is not open."""
        ...

    def owner(self) -> int:
        """Whose the file is, by the number that the machine knows that user by; -1 if nobody can tell."""
        ...

    def stat(self) -> os.stat_result:
        """The file's attributes."""
        ...

    def size(self) -> int:
        """Length of the file."""
        ...

    def modified_ns(self) -> int:
        """When the file was written to last, in nanoseconds since 1970."""
        ...

    def disk_usage(self) -> int:
        """Bytes that the file takes on disk, 0 if the file system does not tell. Raises nothing: it is shown only."""
        ...

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Fill `view` if that needs no waiting for the disk; False: it was not filled, use `read`."""
        ...

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`; past the end of the file there are zeros. BadOverlay: there was more when it was opened."""
        ...

    def extent(self, offset: int) -> FileExtent:
        """What lies from `offset` on, as far as it is of one kind; behind the end of the file is a hole.

        A file system that cannot tell says that all is data. May wait for the disk, and fail, as `read` may.
        """
        ...

    def write(self, offset: int, data: Sequence[Buffer]) -> None:
        """Write all of the buffers, one behind the other.

        NoSpace: some of it may have been written. BadOverlay: the file was cut, and nothing was written.
        """
        ...

    def resize(self, size: int) -> None:
        """Grow the file to `size`; the new bytes are zeros."""
        ...

    def barrier(self) -> None:
        """Return when all that was written before this call survives a power cut (fdatasync).

        BadOverlay: the file was cut.
        """
        ...

    def refresh(self) -> None:
        """From now on read what the disk has: write out what can be written, then drop the page cache.

        For what may have gone wrong before: after a failed write-back the page cache shows what the disk lacks.

        Raises:
            QedfsError: the disk did not take everything. Reads tell what it has.
            InUse: another program keeps part of the file in memory, so nobody can tell what the disk has.
        """
        ...

    def drop_cache(self, offset: int, size: int) -> None:
        """Tell the kernel that these bytes, already durable, will not be read soon."""
        ...

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run a call that may wait for the disk without stopping the event loop; it is never abandoned half way."""
        ...

    def close(self) -> None:
        """Give up the file and its locks."""
        ...


class FileStorage:
    """A regular file."""

    def __init__(self, fd: int, path: str, *, writable: bool, locked: bool = False) -> None:
        self._fd = fd
        self.path = path
        self.writable = writable
        self.locked = locked
        self._limiter: trio.CapacityLimiter | None = None
        kind = filesystem_type(fd)
        # tmpfs refuses RWF_NOWAIT, and has no disk to wait for.
        self._read_flags = 0 if kind in TMPFS_TYPES else os.RWF_NOWAIT
        self._nowait = True
        self._length = Length(fd, path, kind)
        self._foreign: BadOverlay | None = None  # why nothing in the file can be believed

    @classmethod
    def open(cls, path: str, *, writable: bool, locked: bool = True, dir_fd: int | None = None) -> Self:
        """Open an overlay file, with QEMU's byte locks unless told otherwise. With `dir_fd`, `path` is for messages.

        O_NOFOLLOW and O_NONBLOCK, then a look at the type: a folder of overlays may hold links, FIFOs and devices.

        Raises:
            UsageError: there is no such file, or it may not be opened so.
            BadOverlay: it is no regular file.
            InUse: QEMU or qedfs has it open.
        """
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(path if dir_fd is None else os.path.basename(path), flags, dir_fd=dir_fd)
        except OSError as exc:
            raise _open_error(path, exc, writable=writable) from exc
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadOverlay(f"{path}: is not a regular file")
            if locked:
                _lock_as_qemu(fd, path, writable=writable)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, writable=writable, locked=locked)

    def open_for_writing(self) -> bool | None:
        """Whether anybody has the file open for writing; None: nobody can tell. Of a file that is open for reading.

        A read lease is granted only while nobody has (fcntl(2), F_SETLEASE); ours is given back at once. It takes the
        file's owner or CAP_LEASE, and a file system of this machine: a server may refuse one for reasons of its own.
        """
        if filesystem_type(self._fd) in _SERVED_TYPES:
            return None
        try:
            # Who opens the file for writing just now makes the kernel send us a signal: by default SIGIO, which would
            # end us. SIGURG does nothing (signal(7)).
            fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as exc:
            return True if exc.errno == errno.EAGAIN else None
        return False

    def name(self) -> str:
        """The inode: it follows the file through renames and is not shared with a copy in the same file system.

        A snapshot of the file system (btrfs, LVM, ZFS) has the same inodes: `device` tells them apart.
        """
        return f"{self.stat().st_ino:x}"

    def device(self) -> int:
        """st_dev. When the file system is mounted again, it may be another number."""
        return self.stat().st_dev

    def owner(self) -> int:
        """st_uid; inside a user namespace that of the one around it."""
        return outer_user(self.stat().st_uid)

    def stat(self) -> os.stat_result:
        """The file's attributes."""
        try:
            return os.fstat(self._fd)
        except OSError as exc:
            raise self._translated("look at", exc) from exc

    @property
    def damage(self) -> BadOverlay | None:
        """That it was cut, or is another one's."""
        return self._length.damage

    def condemn(self, error: BadOverlay) -> None:
        """Nothing is written or read any more."""
        self._foreign = BadOverlay(f"{self.path}: {error}")
        self._length.condemn(self._foreign)
        self._nowait = False

    def check_length(self) -> None:
        """One lseek."""
        self._length.check()

    def size(self) -> int:
        """Length of the file."""
        return self.stat().st_size

    def modified_ns(self) -> int:
        """st_mtime_ns."""
        return self.stat().st_mtime_ns

    def disk_usage(self) -> int:
        """Bytes that the file takes on disk (st_blocks counts units of 512 whatever the file system's block).

        A look at an open file fails if a file server no longer knows it (ESTALE), or is gone.
        """
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError:
            return 0

    def read_now(self, offset: int, view: memoryview) -> bool:
        """One `preadv2` with RWF_NOWAIT: 1.1 us for 4 KiB in the page cache, a thread hop costs 70 us."""
        if not self._nowait:
            return False
        try:
            return os.preadv(self._fd, [view], offset, self._read_flags) == len(view)
        except OSError as exc:
            if exc.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                self._nowait = False
            elif exc.errno != errno.EAGAIN:
                raise self._translated("read", exc) from exc
            return False

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`, waiting for the disk; zeros past the end of the file."""
        if self._foreign is not None:
            raise self._foreign.fresh()
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if not count:
                    # Whoever looks on while others write to the file knows nothing of its length.
                    if self.locked:
                        self._length.check()
                    view[done:] = bytes(len(view) - done)
                    return
                done += count
        except OSError as exc:
            raise self._translated("read", exc) from exc

    def extent(self, offset: int) -> FileExtent:
        """SEEK_DATA and SEEK_HOLE (lseek(2)); a file system without them answers as if there were no holes."""
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
            if data > offset:
                return FileExtent(data, hole=True)
            return FileExtent(os.lseek(self._fd, offset, os.SEEK_HOLE), hole=False)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                if self.locked:
                    self._length.check()
                return FileExtent(MAX_FILE_SIZE, hole=True)
            if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return FileExtent(MAX_FILE_SIZE, hole=False)
            raise self._translated("look for holes", exc) from exc

    def write(self, offset: int, data: Sequence[Buffer]) -> None:
        """Write all of the buffers; a short write is continued, so that a full disk shows as its ENOSPC."""
        left = [memoryview(buffer) for buffer in data if len(buffer)]
        if not left:
            return  # it makes no file longer
        end = offset + sum(map(len, left))
        self._length.before_write(end)
        try:
            while left:
                count = os.pwritev(self._fd, left[:1024], offset)
                offset += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if left:
                    left[0] = left[0][count:]
        except OSError as exc:
            raise self._translated("write", exc) from exc
        self._length.written(end)

    def resize(self, size: int) -> None:
        """ftruncate."""
        try:
            with self._length.resizing(size):
                os.ftruncate(self._fd, size)
        except OSError as exc:
            raise self._translated("resize", exc) from exc

    def barrier(self) -> None:
        """Fdatasync: it covers the data and the length of the file (POSIX: what is needed to read the data back)."""
        self._length.check()  # it would succeed over what is no longer there
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            raise self._translated("sync", exc) from exc

    def refresh(self) -> None:
        """Fdatasync, then eviction. A tmpfs has no disk: its pages are the file."""
        failure: OSError | None = None
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            failure = exc
        if filesystem_type(self._fd) not in TMPFS_TYPES and not evict(self._fd):
            raise InUse(
                f"{self.path}: was not closed in order, and another program keeps part of it in memory, so that nobody "
                "can tell what the disk has; close that program first"
            )
        if failure is not None:
            raise self._translated("sync", failure) from failure

    def drop_cache(self, offset: int, size: int) -> None:
        """posix_fadvise; only advice, so it cannot fail in a way that matters."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """A worker thread of trio; cancellation waits for the call to end, so no write is in doubt."""
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(THREADS)
        return await trio.to_thread.run_sync(function, limiter=self._limiter)

    def close(self) -> None:
        """The locks belong to the open file description and go with it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # A file server may tell here that it has not taken something. What had to be durable had its barrier, and
            # Linux has closed the file whatever it says (close(2)).
            with contextlib.suppress(OSError):
                os.close(fd)

    def _translated(self, action: str, exc: OSError) -> QedfsError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(f"{self.path}: the file system is full; free some space, the overlay is intact")
        if exc.errno == errno.EFBIG:
            # 4 GiB on FAT, `ulimit -f`, LimitFSIZE=: there is room for no more, as on a full disk. What is there stays.
            return NoSpace(
                f"{self.path}: cannot grow: the file system, or a limit of this process, allows no larger file"
            )
        if exc.errno in (errno.EROFS, errno.EBADF):
            return ReadOnlyOverlay(f"{self.path}: cannot {action}: {os.strerror(exc.errno)}")
        return QedfsError(f"{self.path}: cannot {action}: {exc.strerror}")


def _open_error(path: str, exc: OSError, *, writable: bool) -> QedfsError:
    if exc.errno == errno.ELOOP:
        return BadOverlay(f"{path}: is a symbolic link; name the overlay itself")
    if exc.errno in (errno.ENXIO, errno.EISDIR):
        return BadOverlay(f"{path}: is not a regular file")
    hint = "; the overlay must be writable to keep what is fetched" if writable and exc.errno == errno.EACCES else ""
    return UsageError(f"{path}: {exc.strerror}{hint}")


def _lock_as_qemu(fd: int, path: str, *, writable: bool) -> None:
    """Take QEMU's shared byte locks, then look whether anybody's permissions contradict ours.

    OFD locks are bound to the open file, not to the process: a second qedfs in the same process conflicts too.
    """
    uses = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
    for byte in [_LOCK_USES + p for p in uses] + [_LOCK_UNSHARED + p for p in (_WRITE, _RESIZE)]:
        _ofd_lock(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
    conflicts = [_LOCK_UNSHARED + p for p in uses] + [_LOCK_USES + p for p in (_WRITE, _RESIZE)]
    if any(_ofd_lock(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK for byte in conflicts):
        raise InUse(f"{path}: is in use by another program (QEMU or qedfs); close it there first")


def _ofd_lock(fd: int, command: int, kind: int, byte: int) -> int:
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    return int(_FLOCK.unpack(fcntl.fcntl(fd, command, request))[0])
