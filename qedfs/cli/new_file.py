"""Atomic creation of files: a file gets its name only when it is complete.

Owns the temporary name and its removal, the rules for replacing a file, and the error messages. Must not know what is
written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from qedfs.cli.exit_status import cause_of
from qedfs.errors import NoSpace, UsageError, file_error
from qedfs.host.durable import sync_folder


@contextlib.contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """A file that gets its name, durably, when the block ends without an error. Replaces a file of that name.

    Raises:
        UsageError: the folder is missing.
        Inaccessible: it is not writable.
        NoSpace: the file system is full.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        fd, temporary = tempfile.mkstemp(prefix=".qedfs-", dir=folder)
        try:
            with os.fdopen(fd, "wb") as target:
                yield target
                target.flush()
                umask = os.umask(0)
                os.umask(umask)
                os.fchmod(fd, 0o666 & ~umask)
                # Before the rename: a power cut must leave either the old file or all of this one.
                os.fsync(fd)
            os.replace(temporary, path)
            # After the rename: otherwise a power cut could undo it after we have reported success.
            sync_folder(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except (OSError, ExceptionGroup) as exc:
        cause = cause_of(exc)  # the block may write from several tasks
        if not isinstance(cause, OSError):
            raise
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{path}: the file system is full") from exc
        if cause.errno == errno.EFBIG:
            raise NoSpace(f"{path}: the file system, or a process limit, does not allow a file of that size") from exc
        raise file_error(f"{path}: cannot be written: {cause.strerror}", cause) from exc


def check_replaceable(path: str, magic: bytes, kind: str) -> None:
    """Raise UsageError if `path` exists and does not start with `magic`: the user may have swapped the arguments."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                if file.read(len(magic)) == magic:
                    return
    except FileNotFoundError:
        return
    except OSError as exc:
        raise file_error(f"{path}: cannot be written: {exc.strerror}", exc) from exc
    raise UsageError(f"{path}: exists already and is not a {kind}; remove it or choose another name")
