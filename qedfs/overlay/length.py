"""How long the overlay file has to be, and whether it still is: somebody may cut it while we have it open.

Owns the length that is known: as the file was found, and as what was written to it since has made it. A file that is
shorter was cut. What lay beyond would read as zeros, which nobody has written, and a later write would make the file
long enough again for nobody to notice; so from then on nothing is written to it. Must not know what the bytes mean.

Looks at the length cost a call of their own, so reads do without: one that comes back short is reason enough to look.
A write looks before it may hide a cut, which is one that reaches the end or goes beyond it. Where the length costs no
question to a file server each write looks: 0.2 us of some 15 us. Otherwise what is lost would read as zeros from a
write beyond it until the next look (`Overlay.inspect`).

Threads: any. The lock keeps a look from falling between a change of the length and the note of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from qedfs.errors import BadOverlay

# File systems of this machine that keep the length in the inode (fs/*/inode.c: i_size): a look asks nobody.
LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "ramfs"})


class Length:
    """Of one open file; sizes in bytes."""

    def __init__(self, fd: int, path: str, filesystem_type: str) -> None:
        self.damage: BadOverlay | None = None  # what was done to the file; never cleared
        self._fd = fd
        self._path = path
        self._cheap = filesystem_type in LOCAL_TYPES
        self._known = 0
        self._known = self._look()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise BadOverlay if the file is not what it was."""
        with self._lock:
            self._check()

    def before_write(self, end: int) -> None:
        """Check, if a write up to this offset could hide a cut."""
        enough = self._look() >= self._known if self._cheap else end < self._known
        if not enough or self.damage is not None:
            self.check()

    def written(self, end: int) -> None:
        """The file reaches at least to this offset."""
        if end > self._known:
            with self._lock:
                self._known = max(self._known, end)

    @contextlib.contextmanager
    def resizing(self, size: int) -> Iterator[None]:
        """The block gives the file this length."""
        with self._lock:
            self._check()
            yield
            self._known = size

    def condemn(self, error: BadOverlay) -> None:
        """Let nothing be written any more, for this reason."""
        self.damage = self.damage or error.fresh()

    def _check(self) -> None:
        if self.damage is None and (found := self._look()) < self._known:
            self.damage = BadOverlay(
                f"{self._path}: was cut to {found} bytes while it was open, of {self._known}; what lay beyond is lost, "
                "and nothing is written any more. End its mount, then run qedfs check"
            )
        if self.damage is not None:
            raise self.damage.fresh()

    def _look(self) -> int:
        # Not fstat: 1 us more, and NFS writes all back before it answers. The position is nobody's: reads and writes
        # name theirs.
        try:
            return os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            return self._known  # it proves nothing; the call that wanted to know will meet the trouble itself
