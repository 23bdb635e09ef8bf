"""The file of a Unix socket: whether it is still the one that we created. Must not know who listens on it."""

from __future__ import annotations

from pathlib import Path

Mark = tuple[int, int]


def mark_of(path: Path) -> Mark | None:
    """Identifies this socket among later ones of the same name. The time is needed because inode numbers are reused."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def remove_own(path: Path, mark: Mark | None) -> bool:
    """Remove the socket unless another one has taken its place. Returns whether the name is free now."""
    if mark_of(path) != mark:
        return False
    path.unlink(missing_ok=True)
    return True
