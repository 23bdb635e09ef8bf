"""The folder of overlays on disk that the user mounts, or the single overlay file.

Owns the descriptor of the folder. Must not know which overlays are served.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from qedfs.errors import UsageError, file_error
from qedfs.host.procfs import held_type

SUFFIX = ".qed"


class OverlayFolder:
    """A folder of overlays. `single`: the user named one overlay file; `root` is then the folder that holds it."""

    def __init__(self, source: str) -> None:
        """`source`: a folder of overlays, or one overlay file.

        Raises:
            UsageError: it does not exist.
            Inaccessible: it cannot be accessed.
        """
        self.source = os.path.realpath(source)
        self.single = not os.path.isdir(self.source)
        self.root = os.path.dirname(self.source) if self.single else self.source
        try:
            os.stat(self.source)
            # Kept open, so that the overlays stay reachable if our own mount covers this folder.
            self.fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            error = file_error(f"{source}: {exc.strerror}", exc)
            if isinstance(error, UsageError):
                error = UsageError(f"{error}; qedfs create makes an overlay")
            raise error from exc

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)

    def known(self) -> contextlib.AbstractContextManager[None]:
        """A block in which overlays are opened: it makes that cheap. See `held_type`."""
        return held_type(self.fd)

    def stat(self) -> os.stat_result:
        """The folder's attributes."""
        return os.fstat(self.fd)

    def statvfs(self) -> os.statvfs_result:
        """The statistics of the folder's file system."""
        return os.fstatvfs(self.fd)

    def lstat(self, path: str) -> os.stat_result:
        """The attributes of a file in the folder; of the link itself if it is a symbolic link. Raises OSError."""
        return os.stat(os.path.basename(path), dir_fd=self.fd, follow_symlinks=False)

    def overlays(self) -> Iterator[tuple[str, os.stat_result | OSError]]:
        """The path of each overlay, with its attributes, or the error that occurred when they were read.

        Such an error may come from a bad sector, or from another file system that is mounted over the overlay: another
        user's FUSE mount, or a mount whose server has died. For a single overlay, it is raised as an OSError.
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
