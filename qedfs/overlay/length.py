"""Tracks the length of the overlay file, to detect when another program truncates it.

Owns the expected length: the length when the file was opened, extended by our own writes. If the file is shorter, it
was truncated. The lost bytes would read as zeros that nobody has written, and a later write could restore the length
and so hide the truncation. So nothing is written to the file from then on. Must not know what the bytes mean.

A check costs a system call. Reads check only if they reach the end of the file too early. A write must check if it
could hide a truncation, that is, if it ends at or past the expected end. On a local file system every write checks,
which takes 0.2 us of its 15 us or so. Where a check may need a request to a file server, a write below the end does not
check, and lost bytes may read as zeros until the next check (`Overlay.inspect`).

May be used from any thread. The lock ensures that no check happens between a change of the length and the update of the
expected length.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from qedfs.errors import BadOverlay

# Local file systems that have the length in the inode (fs/*/inode.c: i_size), so that a check needs no I/O.
LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "ramfs"})


class Length:
    """The expected length of one open file. Sizes are in bytes."""

    def __init__(self, fd: int, path: str, filesystem_type: str) -> None:
        self.damage: BadOverlay | None = None  # how the file was damaged; never cleared
        self._fd = fd
        self._path = path
        self.local = filesystem_type in LOCAL_TYPES  # so that a check is cheap
        self._known = 0
        self._known = self._look()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise BadOverlay if the file was truncated or condemned."""
        with self._lock:
            self._check()

    def is_whole(self) -> bool:
        """Whether the file is as long as expected, as far as a look can tell that costs no I/O; otherwise False."""
        return self.local and self.damage is None and self._look() >= self._known

    def before_write(self, end: int) -> None:
        """Check the length if a write up to this offset could hide a truncation."""
        enough = self._look() >= self._known if self.local else end < self._known
        if not enough or self.damage is not None:
            self.check()

    def written(self, end: int) -> None:
        """Record that the file reaches at least to this offset."""
        if end > self._known:
            with self._lock:
                self._known = max(self._known, end)

    @contextlib.contextmanager
    def resizing(self, size: int) -> Iterator[None]:
        """Check the length, run the block, which sets the length to `size`, and record that."""
        with self._lock:
            self._check()
            yield
            self._known = size

    def condemn(self, error: BadOverlay) -> None:
        """Mark the file as damaged, so that nothing is written to it any more."""
        self.damage = self.damage or error.fresh()

    def _check(self) -> None:
        if self.damage is None and (found := self._look()) < self._known:
            self.damage = BadOverlay(
                f"{self._path}: was truncated to {found} bytes while it was open, from {self._known}; the data past "
                "that is lost, and nothing is written any more. End its mount, then run qedfs check"
            )
        if self.damage is not None:
            raise self.damage.fresh()

    def _look(self) -> int:
        # Not fstat, which takes 1 us more, and on NFS first writes everything back. The file position may change, as
        # all reads and writes pass theirs.
        try:
            return os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            return self._known  # the error proves no truncation, and the caller's own system call will report it
