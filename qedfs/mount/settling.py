"""Whether a file in the folder is complete, or still being copied there.

Owns the rule. Must not know when a file is looked at again (`registry.py`), nor how it is served. A file that appears
while the mount serves is left alone until one second after its last change, since most copies write more often than
that. Any file is left alone while a program has it open for writing, as `cp` does until it ends, even if it stalls.
Where the file system cannot tell who has a file open, a new file must be as long as its tables say.
"""

from __future__ import annotations

import contextlib
import os
import time

from qedfs.errors import BadOverlay, InUse
from qedfs.overlay.check import check
from qedfs.overlay.session import read_header
from qedfs.overlay.storage import FileStorage

SETTLE_SECONDS = 1.0


class BeingWritten(InUse):
    """Another program, perhaps a copy, has the file open for writing. The file is served after it has been closed."""


def settling(status: os.stat_result) -> bool:
    """Whether the file was changed within SETTLE_SECONDS. A change in the future means a wrong clock: no wait."""
    return 0 <= time.time() - status.st_mtime < SETTLE_SECONDS


async def check_settled(path: str, dir_fd: int, *, is_new: bool) -> None:
    """Return if the overlay may be opened. Writes nothing. `is_new`: the file appeared while the mount serves.

    Raises:
        InUse: QEMU or another mount has it open for writing; try again later.
        BeingWritten: another program has it open for writing; try again later.
        BadOverlay: it is shorter than its tables say; try again after it has changed.
        UsageError, Inaccessible: it cannot be opened.
    """
    with contextlib.closing(FileStorage.open(path, writable=False, dir_fd=dir_fd)) as storage:
        written = storage.open_for_writing()
        if written:
            raise BeingWritten(f"{path}: another program has it open for writing; it is served once that has closed it")
        if is_new and written is None:
            problem = await storage.in_thread(lambda: _problem(storage))
            if problem:
                raise BadOverlay(f"{path}: {problem}; it may still be being copied")


def _problem(storage: FileStorage) -> str:
    """The first problem that a check finds, such as an entry that points past the end of the file; "" if none."""
    try:
        return check(storage, read_header(storage)[0]).first_problem
    except BadOverlay as exc:
        return str(exc)
