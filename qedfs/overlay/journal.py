"""The session journal: the entries of acknowledged writes that have not been committed yet, in case we are killed.

Owns one small file on a tmpfs per open overlay. A write to a new cluster is acknowledged once its data is in the page
cache and its entry is in this file. Both survive the death of the process, and neither survives a power cut. So the
next opening in the same boot loses nothing. After a power cut the journal is gone, and so is the unflushed write.

The file names the boot, the session and the device. The overlay has the session in its record (`format/record.py`). A
journal of another boot, or of another session than the overlay's, is ignored, because another program may have written
since. A copy of an overlay may have the same session as its original, which may still be in use. Two things distinguish
them: the device, and the lock that a process holds on its journal while it lives.

An entry is the offset of a cluster's data, or says that a run of clusters reads as zeros since a discard, that a run of
clusters was dropped and reads as the backing, or that the data of a cluster was moved to this offset. The order of
entries is that in which they were set, and the last one of a cluster counts. A move is one entry, not a discard with an
offset after it: a kill, or a full tmpfs, may come between two entries. Must not know more about them; `recovery.py`
validates them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import os
import stat
import struct
import threading
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from qedfs.format.tables import ZERO, encode_table
from qedfs.host.procfs import boot_id, mount_number, outer_user
from qedfs.host.runtime import RuntimeFolder

# (cluster, offset of its data), (cluster, `moved_to`), (first cluster, `zero_run`) or (first cluster, `dropped_run`)
Pair = tuple[int, int]

_PAIR = struct.Struct("<QQ")
_HEADER = struct.Struct("<8s40s40sQ16x")  # magic, boot, session, device; the first pair is the witness
_START = _HEADER.size + _PAIR.size
_NO_WITNESS = (0, 0)
_MAGIC = b"qedfsj\0\5"
# The older ones have no drops, then no moves, the oldest no runs of zeros.
_MAGICS = (_MAGIC, b"qedfsj\0\4", b"qedfsj\0\3", b"qedfsj\0\2")
_RUN_SHIFT = 12  # offsets are multiples of 4 KiB, which leaves the low bits for a mark
_MARKS = (1 << _RUN_SHIFT) - 1
_MOVED = ZERO + 1
_DROPPED = ZERO + 2
# A hundred times what accumulates with a commit every second and a slow disk. Also bounds how much of another user's
# journal is read.
MOST_BYTES = 64 << 20


def zero_run(count: int) -> int:
    """The entry of `count` clusters that read as zeros."""
    return count << _RUN_SHIFT | ZERO


def dropped_run(count: int) -> int:
    """The entry of `count` clusters that are missing again, as the backing has the same bytes."""
    return count << _RUN_SHIFT | _DROPPED


def run_count(entry: int) -> int:
    """How many clusters, from the pair's one on, this entry is about; 0 if it is the offset of one cluster's data."""
    return entry >> _RUN_SHIFT if entry & _MARKS in (ZERO, _DROPPED) else 0


def is_drop(entry: int) -> bool:
    """Whether this entry is of a run of clusters that were dropped."""
    return entry & _MARKS == _DROPPED


def moved_to(offset: int) -> int:
    """The entry of a cluster whose data is at `offset` from now on, wherever it was before."""
    return offset | _MOVED


def is_move(entry: int) -> bool:
    """Whether this entry is of a cluster that had data at another place before."""
    return entry & _MARKS == _MOVED


def place_of(entry: int) -> int:
    """The offset of the data of an entry that is no run."""
    return entry & ~_MOVED if is_move(entry) else entry


class Journal:
    """An open journal. `append` takes 1.3 us: a write of 16 bytes per entry to the tmpfs, and an fstat."""

    def __init__(self, fd: int, path: Path, header: bytes) -> None:
        self._fd = fd
        self.path = path
        self._header = header
        self._void = threading.Event()
        self.end = _START  # where the entries in the file end, in bytes

    @classmethod
    def create(cls, folder: Path, name: str, session: str, device: int) -> Self:
        """Create the journal of `session` for the overlay `name` on `device`.

        Raises:
            OSError: the tmpfs is full or not writable. The caller then does without a journal.
        """
        path = _place(folder, name, session)
        header = _HEADER.pack(_MAGIC, boot_id().encode(), session.encode(), device)
        return cls(_replaced(path, header + _PAIR.pack(*_NO_WITNESS)), path, header)

    def append(self, pairs: Iterable[Pair]) -> None:
        """Add the new entries of these clusters: all of them or, after an error, none.

        Raises:
            OSError: the tmpfs is full, or the file was removed (ENOENT), for example by a logout. The entries have to
                be committed before the write is acknowledged.
        """
        data = encode_table(array("Q", itertools.chain.from_iterable(pairs)))
        if self.end > MOST_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if os.pwrite(self._fd, data, self.end) < len(data):
            # A replay would move clusters that have not been moved, and what was written to them since would be lost.
            os.ftruncate(self._fd, self.end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # After the write, so that a removal before the acknowledgement is noticed.
        if not os.fstat(self._fd).st_nlink:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.end += len(data)

    def landed(self, end: int) -> bool:
        """Drop the entries before `end`, an earlier value of the attribute, because the overlay has them.

        Returns whether the file has none of them any more, except the last one, which the overlay may contradict.

        The last of them, now the witness, and all later ones go into a new file, which replaces the old one atomically.
        So a kill leaves one of the two. Takes 14 us.
        """
        # A void journal must not get its name again, not even for a moment, because we may be killed then.
        if end <= _START or self._void.is_set():  # below it: of a group that was taken before the session began
            return True
        witness = end - _PAIR.size
        try:
            kept = os.pread(self._fd, self.end - witness, witness)
            fd = _replaced(self.path, self._header + kept)
        except OSError:
            return False  # the entries stay, but the overlay has them, so a replay ignores them
        # The new file was locked before it got the name, so the file of that name has been locked all the time.
        os.close(self._fd)
        self._fd, self.end = fd, len(self._header) + len(kept)
        # Check again: `void` may have removed the old file just before the new one got its name.
        if self._void.is_set():
            self.void()
        return True

    def void(self) -> None:
        """Make the journal void for later sessions. May be called from any thread, even during `landed`."""
        # Before the `unlink`: if `landed` creates a new file after that, it sees this and removes the file.
        self._void.set()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def close(self, *, remove: bool) -> None:
        """Close the journal. `remove` it if the overlay has all entries."""
        os.close(self._fd)
        if remove:
            self.void()


@dataclasses.dataclass(frozen=True, slots=True)
class OrphanJournal:
    """The journal of a killed session.

    `witness`: the last entry that the session committed to the overlay.
    """

    place: RuntimeFolder
    name: str  # of the file
    same_device: bool  # otherwise it may belong to another overlay, of which ours is a snapshot
    witness: Pair | None
    data: bytes

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.place.path / self.name

    @property
    def pairs(self) -> Iterator[Pair]:
        """The entries, oldest first. An iterator, because there may be millions."""
        return _PAIR.iter_unpack(self.data)

    def remove(self) -> None:
        """Remove the file, after the overlay has all entries or a new session. Keep it if it may be of another one."""
        if self.same_device:
            with contextlib.suppress(OSError), self.place.opened() as folder:
                for name in (self.name, _fresh(Path(self.name)).name):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)


def read_journal(place: RuntimeFolder, name: str, session: str, device: int, *, locked: bool) -> OrphanJournal | None:
    """Read the journal of `session` from this boot. None if it is void, or its process is still alive.

    `locked`: the caller has the locks of the overlay on `device`. Then the process that wrote a journal for the same
    device is dead, even if the kernel has not closed this file yet.

    Raises:
        OSError: FileNotFoundError if there is none. Otherwise it could not be read, so its contents are unknown.
    """
    file_name = _place(Path(), name, session).name
    with place.opened() as folder, open(_opened(file_name, folder, place.user), "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, boot, owner, found = _HEADER.unpack(header)
        if magic not in _MAGICS:
            raise OSError(errno.EBADMSG, "is of another version of qedfs")
        if (boot.rstrip(b"\0"), owner.rstrip(b"\0")) != (boot_id().encode(), session.encode()):
            return None
        if not (locked and found == device) and _is_live(file.fileno()):
            return None
        first = file.read(_PAIR.size)
        pairs = file.read(MOST_BYTES)
    if len(first) < _PAIR.size:
        return None
    if len(first) + len(pairs) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"is larger than {MOST_BYTES >> 20} MiB")
    witness = _PAIR.unpack(first)
    if rest := len(pairs) % _PAIR.size:
        pairs = pairs[:-rest]  # this copies, so the first pair is read separately to avoid another copy
    return OrphanJournal(place, file_name, found == device, witness if witness != _NO_WITNESS else None, pairs)


def _opened(name: str, folder: int, user: int | None) -> int:
    """Open a journal of this user for reading. Does not open a device or a FIFO, nor access another file system."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        same = mount_number(fd) == mount_number(folder)
        status = os.fstat(fd) if same else None
        if status is None or not stat.S_ISREG(status.st_mode) or user not in (None, outer_user(status.st_uid)):
            raise OSError(errno.EBADMSG, "is no journal of that user")
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _place(folder: Path, name: str, session: str) -> Path:
    return folder / f"{name}-{session}"


def _fresh(path: Path) -> Path:
    return path.with_suffix(".new")


def _replaced(path: Path, content: bytes) -> int:
    """Replace the journal atomically by one with `content`. Returns its descriptor, which holds the lock."""
    fresh = _fresh(path)
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.write(fd, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fresh.replace(path)
    except OSError:
        os.close(fd)
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    return fd


def _is_live(fd: int) -> bool:
    """Whether the process of this journal is alive. Also true if the journal was replaced a moment ago."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return not os.fstat(fd).st_nlink
