"""The session journal: entries that a killed process had acknowledged and not yet brought into the overlay.

Owns one small file on a tmpfs per open overlay. A write to a new cluster is answered as soon as its data is in the page
cache and its entry is in this file: both survive the death of the process and neither survives the power, so the next
open in the same boot loses nothing, and after a power cut the file is void, as the unflushed write is.

The file names the boot, the session and the device; the overlay carries the session (`format/record.py`). A journal of
another boot, or of a session that the overlay no longer carries, is ignored: somebody else may have written since. A
copy of an overlay may carry the session of another one that is still in use. What tells them apart is the device, and
the lock that a process has on its journal while it lives.

Must not know what the entries mean: `recovery.py` judges them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from qedfs.host.procfs import boot_id, mount_number, outer_user
from qedfs.host.runtime import RuntimeFolder

Pair = tuple[int, int]  # cluster, entry

_PAIR = struct.Struct("<QQ")
_HEADER = struct.Struct("<8s40s40sQ16x")  # magic, boot, session, device; the first pair is the witness
_START = _HEADER.size + _PAIR.size
_NO_WITNESS = (0, 0)
_MAGIC = b"qedfsj\0\2"
# What a commit every second and a slow disk come to is a hundredth of it. Also what is read of another user's.
MOST_BYTES = 64 << 20


class Journal:
    """An open journal. `append` is one write of 16 bytes an entry into memory and a look at the file: 1.3 us."""

    def __init__(self, fd: int, path: Path, header: bytes) -> None:
        self._fd = fd
        self.path = path
        self._header = header
        self._void = threading.Event()
        self.end = _START  # of the entries in the file, in bytes

    @classmethod
    def create(cls, folder: Path, name: str, session: str, device: int) -> Self:
        """Start the journal of `session`, of the overlay `name` on `device`.

        Raises:
            OSError: the tmpfs is full or not writable; the caller does without a journal then.
        """
        path = _place(folder, name, session)
        header = _HEADER.pack(_MAGIC, boot_id().encode(), session.encode(), device)
        return cls(_replaced(path, header + _PAIR.pack(*_NO_WITNESS)), path, header)

    def append(self, pairs: Iterable[Pair]) -> None:
        """Remember that these clusters have these entries now.

        Raises:
            OSError: the tmpfs is full, or the file was removed (ENOENT), by a logout for example. The entries have to
                be committed before the write is answered.
        """
        data = b"".join(_PAIR.pack(cluster, entry) for cluster, entry in pairs)
        if self.end > MOST_BYTES or os.pwrite(self._fd, data, self.end) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Behind the write: what was removed before the answer is seen.
        if not os.fstat(self._fd).st_nlink:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.end += len(data)

    def landed(self, end: int) -> None:
        """Forget the entries before `end`, an earlier value of the attribute: the overlay has them.

        The last of them, now the witness, and the later ones go into a new file that takes the place of the old one:
        whoever is killed leaves either. 14 us.
        """
        # A void one must not come to its place again, not even until it is unlinked: we may be killed in between.
        if end == _START or self._void.is_set():
            return
        witness = end - _PAIR.size
        try:
            kept = os.pread(self._fd, self.end - witness, witness)
            fd = _replaced(self.path, self._header + kept)
        except OSError:
            return  # what stays is in the overlay: a replay passes it over
        os.close(self._fd)
        self._fd, self.end = fd, len(self._header) + len(kept)
        if self._void.is_set():
            self.void()

    def void(self) -> None:
        """Let no later session have the entries. From any thread: `landed` may be putting a new file there."""
        self._void.set()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def close(self, *, remove: bool) -> None:
        """Close; `remove` when the overlay has all entries."""
        os.close(self._fd)
        if remove:
            self.void()


@dataclasses.dataclass(frozen=True, slots=True)
class OrphanJournal:
    """What a session that was killed has left.

    `witness`: an entry that the session had brought into the overlay, as late as possible.
    """

    place: RuntimeFolder
    name: str  # of the file
    same_device: bool  # else it is perhaps that of the overlay that ours is a snapshot of
    witness: Pair | None
    data: bytes

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.place.path / self.name

    @property
    def pairs(self) -> Iterator[Pair]:
        """Oldest first. Made one by one: there may be millions."""
        return _PAIR.iter_unpack(self.data)

    def remove(self) -> None:
        """The overlay has all entries, or another session: nobody needs the journal, unless it may be another's."""
        if self.same_device:
            with contextlib.suppress(OSError), self.place.opened() as folder:
                for name in (self.name, _fresh(Path(self.name)).name):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)


def read_journal(place: RuntimeFolder, name: str, session: str, device: int, *, locked: bool) -> OrphanJournal | None:
    """What `session` left behind in this boot, if it did and its process is dead.

    `locked`: the caller has the locks of the overlay on `device`. Then the process of a journal of the same device is
    dead, even if it has not yet come to closing this file.

    Raises:
        OSError: FileNotFoundError if there is none; else it was not read, so nobody knows what is in it.
    """
    file_name = _place(Path(), name, session).name
    with place.opened() as folder, open(_opened(file_name, folder, place.user), "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, boot, owner, found = _HEADER.unpack(header)
        if magic != _MAGIC:
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
        pairs = pairs[:-rest]  # a copy, which is why the first pair is read by itself
    return OrphanJournal(place, file_name, found == device, witness if witness != _NO_WITNESS else None, pairs)


def _opened(name: str, folder: int, user: int | None) -> int:
    """A journal of this user, opened for reading. Asks nothing of a device, a pipe or a file system in its place."""
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
    """Let the journal be `content` from one instant to the next; returns its descriptor, which holds the lock."""
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
    """Whether the process that this journal belongs to lives. One that was replaced just now has a living process."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return not os.fstat(fd).st_nlink
