"""Names that survive a power cut.

A leaf. fsync(2) of a file covers what the file holds, and not the entry of the folder that leads to it. Who has made,
replaced or removed a name and says that it is done has to sync the folder as well, after the file: otherwise a power
cut a moment later leaves no file of that name, or the one before, though the command had ended with 0. (The other way
round, a name could lead to a file without its bytes.)
"""

from __future__ import annotations

import errno
import os

# File systems that do not sync a folder at all: fsync(2).
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def sync_folder(path: str) -> None:
    """Return when the names in this folder survive a power cut, as they are now. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        os.sync()  # we may write to the folder and not read it: then all there is
        return
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _CANNOT:
            raise
    finally:
        os.close(fd)
