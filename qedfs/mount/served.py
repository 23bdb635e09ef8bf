"""One overlay file that was found: its name and inode in the mount, its image if it can be served, its open files.

Must not know FUSE requests, and not the other overlays.
"""

from __future__ import annotations

import dataclasses
import os

import trio

from qedfs.errors import QedfsError
from qedfs.image.condition import Trouble
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob


@dataclasses.dataclass(slots=True, eq=False)
class Served:
    """One overlay file that was found. `image` is None, and `refusal` says why, if it cannot be served.

    Neither is there while the file is settling: it may still be being copied into the folder.
    """

    name: str
    path: str
    inode: int
    seen: tuple[int, int, int]  # inode, size and ctime of the file when it was opened
    image: Image | None = None
    job: StreamJob | None = None
    refusal: Trouble | None = None
    opens: int = 0
    closes: int = 0  # of descriptors of these opens; one open may have several
    gone: bool = False  # the overlay has left the folder
    passing: bool = False  # what `refusal` says may pass though the file stays as it is
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)  # of what runs for the image

    @property
    def error(self) -> QedfsError | None:
        """Why it cannot be served."""
        return None if self.refusal is None else self.refusal.error

    @property
    def troubles(self) -> list[Trouble]:
        """What is wrong with it now, the most lasting first."""
        if self.image is not None:
            return self.image.condition.troubles()
        return [] if self.refusal is None else [self.refusal]

    @property
    def settling(self) -> bool:
        """Whether it is listed, so that nobody takes it for absent, but not looked into yet."""
        return self.image is None and self.refusal is None

    def is_on(self, found: os.stat_result) -> bool:
        """Whether this is the file that the image is open on."""
        try:
            return self.image is not None and os.path.samestat(self.image.overlay.file_status(), found)
        except QedfsError:
            return False  # its file server is gone, say: that is its own trouble

    def is_deleted(self) -> bool:
        """Whether nobody can want what the overlay holds: its file has no name any more."""
        try:
            return self.image is not None and not self.image.overlay.file_status().st_nlink
        except QedfsError:
            return False

    # What the kernel tells of open files.

    def note_open(self) -> None:
        """One more open() of the image."""
        self.opens += 1

    def note_close(self) -> None:
        """A descriptor was closed; its open() may have others."""
        self.closes += 1

    def note_release(self) -> None:
        """The last descriptor of one open() is gone."""
        self.opens -= 1
        self.closes = max(0, self.closes - 1) if self.opens else 0
