"""The folder of overlays that was mounted, or the one overlay file: what is there on disk.

Owns the descriptor of the folder. Must not know which overlays are served.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from qedfs.errors import UsageError

SUFFIX = ".qed"


class OverlayFolder:
    """A folder of overlays. `single`: of one only, which the user named; the folder is the one that holds it."""

    def __init__(self, source: str) -> None:
        """`source`: a folder of overlays, or one overlay file.

        Raises:
            UsageError: it is not there.
        """
        self.source = os.path.realpath(source)
        self.single = not os.path.isdir(self.source)
        self.root = os.path.dirname(self.source) if self.single else self.source
        try:
            os.stat(self.source)
            # Held open, so that mounting over the folder itself does not hide the overlays from us.
            self.fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise UsageError(f"{source}: {exc.strerror}; qedfs create makes an overlay") from exc

    def close(self) -> None:
        """Give the descriptor up."""
        os.close(self.fd)

    def stat(self) -> os.stat_result:
        """The folder's attributes."""
        return os.fstat(self.fd)

    def statvfs(self) -> os.statvfs_result:
        """The folder's file system."""
        return os.fstatvfs(self.fd)

    def lstat(self, path: str) -> os.stat_result:
        """The attributes of a file of the folder, or of the symbolic link that stands there. Raises OSError."""
        return os.stat(os.path.basename(path), dir_fd=self.fd, follow_symlinks=False)

    def overlays(self) -> Iterator[tuple[str, os.stat_result | OSError]]:
        """The paths of the overlays that the folder holds, with their attributes, or with the reason for none.

        One may be on a bad sector, or be the place of another file system: a mount that its user has made and does not
        let us into, or one whose server has died.
        """
        if self.single:
            yield self.source, os.stat(os.path.basename(self.source), dir_fd=self.fd)
            return
        with os.scandir(self.fd) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX))
        for name in names:
            found: os.stat_result | OSError
            try:
                found = self.lstat(name)
            except FileNotFoundError:
                continue
            except OSError as exc:
                found = exc
            yield os.path.join(self.root, name), found
