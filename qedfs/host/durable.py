"""fsync for directories: makes created, replaced and removed file names survive a power cut.

fsync(2) of a file covers its contents but not its directory entry. A command that creates, replaces or removes a file
must therefore sync the folder, too, before it reports success. Otherwise a power cut can undo the change after the
command has ended with 0. The file comes first, then the folder: in the other order, a name could lead to a file whose
contents are lost. Imports nothing of the project. The barriers of an open overlay are in `overlay/barrier.py`.
"""

from __future__ import annotations

import errno
import os

# Errors of file systems that cannot sync a folder at all, see fsync(2).
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def sync_folder(path: str) -> None:
    """Make the current names in this folder durable. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        os.sync()  # we may write to the folder but not open it for reading, so sync everything
        return
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def sync_file(path: str) -> None:
    """Make a file and its times durable. (fdatasync(2) leaves the times out.) Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
