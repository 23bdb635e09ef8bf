"""The session journal: entries that a killed process had acknowledged and not yet brought into the overlay.

Owns one small file on a tmpfs per open overlay. A write to a new cluster is answered as soon as its data is in the page
cache and its entry is in this file: both survive the death of the process and neither survives the power, so the next
open in the same boot loses nothing, and after a power cut the file is void, as the unflushed write is.

The file names the boot and the session; the overlay carries the session (`format/record.py`). A journal of another
boot, or of a session that the overlay no longer carries, is ignored: somebody else may have written since.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from qedfs.runtime import boot_id

_PAIR = struct.Struct("<QQ")  # cluster, entry
_HEADER = struct.Struct("<8s40s64s16x")  # magic, boot, session
_MAGIC = b"qedfsj\0\1"


class Journal:
    """An open journal. `append` is one write of 16 bytes an entry into memory: 0.6 us."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._end = _HEADER.size

    @classmethod
    def create(cls, folder: Path, name: str, session: str) -> Self:
        """Start the journal of `session`, replacing the one that has been replayed.

        Raises:
            OSError: the tmpfs is full or not writable; the caller does without a journal then.
        """
        path = folder / name
        fresh = path.with_suffix(".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, _HEADER.pack(_MAGIC, boot_id().encode(), session.encode()))
            fresh.replace(path)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, path)

    def append(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Remember that these clusters have these entries now.

        Raises:
            OSError: the tmpfs is full; the entries have to be committed before the write is answered.
        """
        data = b"".join(_PAIR.pack(cluster, entry) for cluster, entry in pairs)
        if os.pwrite(self._fd, data, self._end) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(data)

    def reset(self) -> None:
        """Forget all entries: the overlay has them."""
        if self._end > _HEADER.size:
            self._end = _HEADER.size
            # Entries that stay behind because this fails are in the overlay: a replay passes them over.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)

    def close(self, *, remove: bool) -> None:
        """Close; `remove` when the overlay has all entries."""
        os.close(self._fd)
        if remove:
            self._path.unlink(missing_ok=True)


def read_journal(folder: Path, name: str, session: str) -> list[tuple[int, int]]:
    """The (cluster, entry) pairs that `session` left behind in this boot, oldest first; empty if there are none."""
    try:
        data = (folder / name).read_bytes()
    except OSError:
        return []
    if len(data) < _HEADER.size:
        return []
    magic, boot, owner = _HEADER.unpack_from(data)
    if (magic, boot.rstrip(b"\0"), owner.rstrip(b"\0")) != (_MAGIC, boot_id().encode(), session.encode()):
        return []
    whole = (len(data) - _HEADER.size) // _PAIR.size * _PAIR.size
    return list(_PAIR.iter_unpack(data[_HEADER.size : _HEADER.size + whole]))
