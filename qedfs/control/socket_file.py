"""The file of a Unix socket: whether it is still the one that we have made. Must not know who listens there."""

from __future__ import annotations

from pathlib import Path

Mark = tuple[int, int]


def mark_of(path: Path) -> Mark | None:
    """What tells this socket from a later one of the same name: inodes are used again, the time of making is not."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def remove_own(path: Path, mark: Mark | None) -> bool:
    """Remove the socket unless another one has its place by now; returns whether the name is free."""
    if mark_of(path) != mark:
        return False
    path.unlink(missing_ok=True)
    return True
