"""Whether a file of the folder is whole, or still on its way there.

Owns the rule. A file that came while we serve is left alone for a second after its last change, which most copies are
done in. Any file is left alone while somebody has it open for writing, as `cp` has for as long as it runs, however long
it stalls. Where the file system does not tell who has it open, one that came has to be as long as its tables say.
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
    """Another program has the file open for writing, as one that copies it has: it is served once that has ended."""


def settling(status: os.stat_result) -> bool:
    """Whether the file was changed a moment ago. A change in the future is somebody's clock, and no reason to wait."""
    return 0 <= time.time() - status.st_mtime < SETTLE_SECONDS


async def check_settled(path: str, dir_fd: int, *, came: bool) -> None:
    """Return if the file may be opened; it has not been written to. `came`: it did while we serve.

    Raises:
        InUse: somebody has it open for writing; look again later. BeingWritten: and is neither QEMU nor qedfs.
        BadOverlay: it is not as long as its tables say; look again when it has changed.
        UsageError: it cannot be opened.
    """
    with contextlib.closing(FileStorage.open(path, writable=False, dir_fd=dir_fd)) as storage:
        written = storage.open_for_writing()
        if written:
            raise BeingWritten(f"{path}: another program has it open for writing; it is served once that has closed it")
        if came and written is None:
            problem = await storage.in_thread(lambda: _problem(storage))
            if problem:
                raise BadOverlay(f"{path}: {problem}; it may still be being copied")


def _problem(storage: FileStorage) -> str:
    """What in the file points to where the file does not reach, or is wrong otherwise."""
    try:
        return check(storage, read_header(storage)[0]).first_problem
    except BadOverlay as exc:
        return str(exc)
