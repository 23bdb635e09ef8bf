"""Access to the overlay file: the only module that holds its descriptor and writes to it.

Owns the descriptor, its locks and the translation of OSError. Knows offsets and bytes; must not know what they mean.

All methods are synchronous and short, but may wait for the disk. `in_thread` moves such a call off the event loop. The
tests have another implementation of `Storage`, which records the calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

from qedfs.errors import BadOverlay, InUse, NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.geometry import MAX_FILE_SIZE
from qedfs.host import lease
from qedfs.host.fallocate import KEEP_SIZE, PUNCH_HOLE, fallocate
from qedfs.host.procfs import TMPFS_TYPES, filesystem_type, outer_user
from qedfs.host.write_probe import WriteProbe
from qedfs.overlay.length import Length
from qedfs.overlay.opening import open_file
from qedfs.overlay.pagecache import evict
from qedfs.overlay.threads import Threads

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
ChangeMark = tuple[int, int, int]  # length, mtime and ctime of a file
# If the ctime is younger, the file may change again without a change of its times: the kernel's clock for them advances
# in steps of up to 10 ms (a tick).
MARK_AGE_NS = 10**9

_MOST_BUFFERS = 1024  # of one call: IOV_MAX


class FileExtent(NamedTuple):
    """A part of the file that ends before `end`, and is a hole (which reads as zeros) or may be data."""

    end: int
    hole: bool


class Storage(Protocol):
    """The operations on the overlay file. Offsets and sizes are in bytes. All errors are QedfsErrors."""

    path: str  # for messages
    writable: bool
    locked: bool  # whether our locks keep other programs from writing to the file

    @property
    def damage(self) -> BadOverlay | None:
        """How another program has damaged the file while it was open. If set, nothing more is written to it."""
        ...

    def condemn(self, error: BadOverlay) -> None:
        """Stop all reads and writes, because the file contains another overlay now."""
        ...

    def check_length(self) -> None:
        """Raise BadOverlay if the file is shorter than expected, or damaged otherwise."""
        ...

    def name(self) -> str:
        """An id of the file within its file system, independent of its path; "" if there is none."""
        ...

    def device(self) -> int:
        """Distinguishes files of the same `name` on different file systems. May change while the file is not open."""
        ...

    def owner(self) -> int:
        """The uid of the owner, outside our user namespace; -1 if unknown."""
        ...

    def stat(self) -> os.stat_result:
        """The file's attributes."""
        ...

    def size(self) -> int:
        """Length of the file."""
        ...

    def modified_ns(self) -> int:
        """The mtime of the file, in nanoseconds since 1970."""
        ...

    def change_mark(self) -> ChangeMark | None:
        """Length and times, which differ after a later change by whomever; None if the file system tells them late.

        See MARK_AGE_NS for when it is safe to conclude from equal marks that nothing has changed.
        """
        ...

    def disk_usage(self) -> int:
        """Bytes that the file takes on disk; 0 if unknown. Raises nothing, because they are only for display."""
        ...

    def free_bytes(self) -> int:
        """How much the file system has left for us; 0 if unknown. May wait for it, and raises nothing."""
        ...

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Fill `view` if that is possible without waiting for the disk. If it returns False, use `read`."""
        ...

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view`. Past the end of the file there are zeros. Raises BadOverlay if the file was truncated."""
        ...

    def extent(self, offset: int) -> FileExtent:
        """Whether there is data or a hole at `offset`, and where it ends. Past the end of the file there is a hole.

        If the file system cannot tell, everything is data. Like `read`, may wait for the disk, and fail.
        """
        ...

    def would_wait(self) -> bool:
        """Whether a write would wait before it begins: the file system is frozen, or another write has locked the file.

        Takes some microseconds. False if nothing can tell.
        """
        ...

    def wait_to_write(self) -> None:
        """Return when a write would not have to wait before it begins. Writes nothing."""
        ...

    def write(self, offset: int, data: Sequence[Buffer]) -> None:
        """Write all of the buffers, one after the other.

        Raises NoSpace after writing a part, or BadOverlay, before writing anything, if the file was truncated.
        """
        ...

    def resize(self, size: int) -> None:
        """Set the length of the file. New bytes are zeros."""
        ...

    @property
    def unsynced(self) -> bool:
        """Whether something was written that no barrier has covered. True before the first barrier.

        Always true if the length of the file can change without a look at it showing that (on a file server).
        """
        ...

    def barrier(self) -> None:
        """Make everything that was written before this call durable (fdatasync).

        Raises BadOverlay if the file was truncated.
        """
        ...

    def refresh(self) -> None:
        """Write everything back, then evict the page cache, so that reads show what is on the disk.

        Needed because after a failed write-back the page cache shows data that the disk lacks.

        Raises:
            QedfsError: the disk did not take everything. Reads show what it has.
            InUse: another program keeps a part of the file in memory, so that part cannot be read from the disk.
        """
        ...

    def punch(self, offset: int, size: int) -> bool:
        """Give the space of these bytes back to the file system. Returns whether they read as zeros now.

        Raises BadOverlay if the file was truncated.
        """
        ...

    def reserve(self, offset: int, size: int) -> None:
        """Find space for these bytes, also past the end, if the file system can. Raises NoSpace, BadOverlay."""
        ...

    def read_soon(self, offset: int, size: int) -> None:
        """Tell the kernel that these bytes, of a part that is no hole, will be read, so that it begins to read them."""
        ...

    def drop_cache(self, offset: int, size: int) -> None:
        """Tell the kernel that these bytes, already durable, will not be read soon."""
        ...

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run a call that may wait for the disk in a worker thread. It is never abandoned half way."""
        ...

    def begin_in_thread(self, function: Callable[[], None], ended: Callable[[Exception | None], None]) -> None:
        """Run a call in a thread, beside those of `in_thread`. Then `ended` is called there with what it has raised."""
        ...

    def close(self) -> None:
        """Close the file, which releases its locks."""
        ...


class FileStorage(Threads):
    """A `Storage` on a regular file."""

    def __init__(self, fd: int, path: str, *, writable: bool, locked: bool = False) -> None:
        self._fd = fd
        self.path = path
        self.writable = writable
        self.locked = locked
        self._kind = filesystem_type(fd)
        # tmpfs does not support RWF_NOWAIT, but has no disk to wait for.
        self._read_flags = 0 if self._kind in TMPFS_TYPES else os.RWF_NOWAIT
        self._nowait = True
        self._probe: WriteProbe | None = None  # made when it is needed
        self._length = Length(fd, path, self._kind)
        # Objects without content, one per write, because threads write, too, and would count past each other.
        self._written = object()
        self._synced: object = None  # what `_written` was at the start of the last barrier
        self._foreign: BadOverlay | None = None  # set by `condemn`: why the file must not be read any more

    @classmethod
    def open(cls, path: str, *, writable: bool, locked: bool = True, dir_fd: int | None = None) -> Self:
        """Open an overlay file, with QEMU's byte locks if `locked`. With `dir_fd`, only the last part of `path` counts.

        Opens with O_NOFOLLOW and O_NONBLOCK and checks the type, as a folder may contain links, FIFOs and devices.

        Raises:
            UsageError: the file does not exist.
            Inaccessible: it must not be opened in this mode, or the file system fails.
            BadOverlay: it is not a regular file.
            InUse: QEMU or qedfs has it open.
        """
        fd = open_file(path, writable=writable, locked=locked, dir_fd=dir_fd)
        return cls(fd, path, writable=writable, locked=locked)

    def open_for_writing(self) -> bool | None:
        """Whether any process has the file open for writing; None if unknown. Only for a file opened read-only."""
        return lease.open_for_writing(self._fd)

    def name(self) -> str:
        """The inode number. It survives renames, and differs from that of any copy on the same file system.

        A snapshot of the file system (btrfs, LVM, ZFS) has the same inode numbers, but another `device`.
        """
        return f"{self.stat().st_ino:x}"

    def device(self) -> int:
        """st_dev. It may change when the file system is mounted again."""
        return self.stat().st_dev

    def owner(self) -> int:
        """st_uid, mapped to the uid outside our user namespace."""
        return outer_user(self.stat().st_uid)

    def stat(self) -> os.stat_result:
        """The file's attributes."""
        try:
            return os.fstat(self._fd)
        except OSError as exc:
            raise self._translated("access", exc) from exc

    @property
    def damage(self) -> BadOverlay | None:
        """Set if the file was truncated or condemned."""
        return self._length.damage

    def condemn(self, error: BadOverlay) -> None:
        """Stop all reads and writes."""
        self._foreign = BadOverlay(f"{self.path}: {error}")
        self._length.condemn(self._foreign)
        self._nowait = False

    def check_length(self) -> None:
        """Check the length with one lseek."""
        self._length.check()

    def size(self) -> int:
        """Length of the file."""
        return self.stat().st_size

    def modified_ns(self) -> int:
        """st_mtime_ns."""
        return self.stat().st_mtime_ns

    def change_mark(self) -> ChangeMark | None:
        """One fstat, of a file on a local file system."""
        if not self._length.local:
            return None
        try:
            found = os.fstat(self._fd)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def disk_usage(self) -> int:
        """Bytes that the file takes on disk (st_blocks counts units of 512 bytes on every file system).

        fstat of an open file fails if its file server no longer knows the file (ESTALE) or does not answer.
        """
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError:
            return 0

    def free_bytes(self) -> int:
        """fstatvfs(3), without what only root may use."""
        try:
            found = os.fstatvfs(self._fd)
        except OSError:
            return 0
        return found.f_bavail * found.f_frsize

    def read_now(self, offset: int, view: memoryview) -> bool:
        """One `preadv2` with RWF_NOWAIT: 1.1 us for 4 KiB in the page cache, while a worker thread would cost 70 us."""
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
        """Fill `view`, waiting for the disk. Past the end of the file there are zeros."""
        if self._foreign is not None:
            raise self._foreign.fresh()
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if not count:
                    # Without locks, others may be writing to the file, so its length means nothing.
                    if self.locked:
                        self._length.check()
                    view[done:] = bytes(len(view) - done)
                    return
                done += count
        except OSError as exc:
            raise self._translated("read", exc) from exc

    def extent(self, offset: int) -> FileExtent:
        """SEEK_DATA and SEEK_HOLE (lseek(2)). A file system without them reports no holes."""
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

    def would_wait(self) -> bool:
        """One system call, of io_uring."""
        if self._probe is None:
            self._probe = WriteProbe(self._fd, self._kind)
        return self._probe.would_wait()

    def wait_to_write(self) -> None:
        """A write of no bytes, before which the kernel waits as before any other."""
        try:
            os.pwrite(self._fd, b"", 0)
        except OSError as exc:
            raise self._translated("write", exc) from exc

    def write(self, offset: int, data: Sequence[Buffer]) -> None:
        """Write all of the buffers. A short write is continued, so that a full disk results in ENOSPC."""
        size = sum(map(len, data))
        if not size:
            return  # nothing to write, and the length does not change
        end = offset + size
        self._length.before_write(end)
        try:
            done = os.pwritev(self._fd, data[:_MOST_BUFFERS], offset)
            if done < size:
                self._write_rest(offset, data, done)
        except OSError as exc:
            raise self._translated("write", exc) from exc
        finally:
            # After the write: a barrier that begins before its end may lack it. Also after a failure, which may have
            # written a part.
            self._written = object()
        self._length.written(end)

    def _write_rest(self, offset: int, data: Sequence[Buffer], done: int) -> None:
        """Write the buffers after their first `done` bytes."""
        offset += done
        left = [memoryview(buffer) for buffer in data]
        while left:
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if left:
                left[0] = left[0][done:]
                done = os.pwritev(self._fd, left[:_MOST_BUFFERS], offset)
                offset += done

    def resize(self, size: int) -> None:
        """ftruncate."""
        try:
            with self._length.resizing(size):
                os.ftruncate(self._fd, size)
        except OSError as exc:
            raise self._translated("resize", exc) from exc
        finally:
            self._written = object()

    def barrier(self) -> None:
        """fdatasync, which covers data and file length (POSIX: everything that is needed to read the data back)."""
        self._length.check()  # fdatasync would succeed although data was cut off
        written = self._written
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            raise self._translated("sync", exc) from exc
        self._synced = written

    @property
    def unsynced(self) -> bool:
        """Whether something was written since the start of the last successful barrier, or may have been cut off."""
        return self._synced is not self._written or not self._length.is_whole()

    def refresh(self) -> None:
        """fdatasync, then eviction. On a tmpfs there is no disk, and the pages are the file."""
        failure: OSError | None = None
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            failure = exc
        if self._kind not in TMPFS_TYPES and not evict(self._fd):
            raise InUse(
                f"{self.path}: was not closed in order, and another program keeps part of it in memory, so what is on "
                "the disk cannot be read; close that program first"
            )
        if failure is not None:
            raise self._translated("sync", failure) from failure

    def punch(self, offset: int, size: int) -> bool:
        """fallocate with PUNCH_HOLE. Not all file systems can do that, and an error loses nothing."""
        return not self._fallocate(PUNCH_HOLE, offset, size)

    def reserve(self, offset: int, size: int) -> None:
        """fallocate without a change of the length."""
        number = self._fallocate(KEEP_SIZE, offset, size)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise self._translated("reserve space", OSError(number, os.strerror(number)))

    def _fallocate(self, mode: int, offset: int, size: int) -> int:
        """fallocate(2). Returns 0, or the errno. Raises BadOverlay if the file was truncated."""
        self._length.check()
        try:
            return fallocate(self._fd, mode, offset, size)
        finally:
            self._written = object()

    def read_soon(self, offset: int, size: int) -> None:
        """posix_fadvise. In a hole, the kernel would fill memory with zeros. It is only advice, see `drop_cache`."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

    def drop_cache(self, offset: int, size: int) -> None:
        """posix_fadvise. It is only advice, so errors do not matter."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor. The locks belong to the open file description, so they are released."""
        fd, self._fd = self._fd, -1
        if self._probe is not None:
            self._probe.close()
        if fd >= 0:
            # A file server may report a failed write here. A barrier has covered all that had to be durable, and Linux
            # closes the descriptor even on an error (close(2)).
            with contextlib.suppress(OSError):
                os.close(fd)

    def _translated(self, action: str, exc: OSError) -> QedfsError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(f"{self.path}: the file system is full; free some space, the overlay is intact")
        if exc.errno == errno.EFBIG:
            # 4 GiB on FAT, `ulimit -f`, LimitFSIZE=. As on a full disk, the file cannot grow, but loses nothing.
            return NoSpace(
                f"{self.path}: cannot grow: the file system, or a limit of this process, allows no larger file"
            )
        if exc.errno in (errno.EROFS, errno.EBADF):
            return ReadOnlyOverlay(f"{self.path}: cannot {action}: {os.strerror(exc.errno)}")
        return QedfsError(f"{self.path}: cannot {action}: {exc.strerror}")
