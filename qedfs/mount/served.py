"""One overlay file of the mount: its name and inode, its image if it can be served, and how many times it is open.

Owns the counts of what the kernel has reported of open files. Must not know FUSE requests, nor other overlays.
"""

from __future__ import annotations

import dataclasses
import os

import trio

from qedfs.errors import QedfsError
from qedfs.image.condition import Trouble
from qedfs.image.image import Image
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.stream import StreamJob


@dataclasses.dataclass(slots=True, eq=False)
class Served:
    """One overlay file. If it cannot be served, `image` and `jobs` are None and `refusal` says why.

    While the file is settling, all three are None: it may still be being copied into the folder.
    """

    name: str
    path: str
    inode: int
    stamp: tuple[int, int, int]  # inode, size and ctime of the file at the last attempt to open it
    image: Image | None = None
    jobs: ImageJobs | None = None
    refusal: Trouble | None = None
    opens: int = 0
    handles: set[int] = dataclasses.field(default_factory=set)  # of these opens, see `inode_numbers.py`
    open_now: set[Served] = dataclasses.field(default_factory=set)  # all images of the mount that are open
    opened: set[Served] = dataclasses.field(default_factory=set)  # those opened since the last round (`rounds.py`)
    closes: int = 0  # of descriptors of these opens: one open() may result in several descriptors
    removed: bool = False  # from the folder; the image lives on while it is open
    transient: bool = False  # the refusal may end without any change of the file
    stale_pages: bool = False  # the kernel may hold pages of the time before the image was activated
    fresh_opens: int = 0  # opens at which the kernel has dropped its pages
    releases: int = 0  # how many times an open() has ended
    releasing: bool = False  # it leaves the mount once nobody has it open
    unused: trio.Event | None = None  # set when nobody has it open any more, if somebody waits for that
    recording: trio.Event | None = None  # set when the recording of a cut-over, or of its way back, has ended
    cut_over: trio.Lock = dataclasses.field(default_factory=trio.Lock)  # held while it is activated, or the reverse
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)  # of the image's tasks

    @property
    def job(self) -> StreamJob | None:
        """The stream of the image."""
        return None if self.jobs is None else self.jobs.stream

    @property
    def error(self) -> QedfsError | None:
        """Why it cannot be served."""
        return None if self.refusal is None else self.refusal.error

    @property
    def troubles(self) -> list[Trouble]:
        """What is wrong with it now, the most lasting trouble first."""
        if self.image is not None:
            return self.image.condition.troubles()
        return [] if self.refusal is None else [self.refusal]

    @property
    def settling(self) -> bool:
        """Whether it is listed, but not opened yet."""
        return self.image is None and self.refusal is None

    def is_on(self, found: os.stat_result) -> bool:
        """Whether the image is open on the file with this status."""
        try:
            return self.image is not None and os.path.samestat(self.image.overlay.file_status(), found)
        except QedfsError:
            return False  # perhaps its file server is down, which readers of the image will notice themselves

    def is_deleted(self) -> bool:
        """Whether the file has no name any more, so that its content cannot be used after it is closed."""
        try:
            return self.image is not None and not self.image.overlay.file_status().st_nlink
        except QedfsError:
            return False

    # What the kernel reports of open files.

    def note_open(self) -> bool:
        """FUSE_OPEN: one more open(). Returns whether the kernel may keep the pages that it has of the image."""
        self.opens += 1
        self.open_now.add(self)
        self.opened.add(self)
        keep = not (self.stale_pages or (self.image is not None and self.image.in_standby))
        self.fresh_opens += not keep
        return keep

    def note_close(self) -> None:
        """FUSE_FLUSH: a descriptor was closed; its open() may have others."""
        self.closes += 1

    def note_release(self) -> None:
        """FUSE_RELEASE: the last descriptor of one open() was closed."""
        self.opens -= 1
        self.closes = max(0, self.closes - 1) if self.opens else 0
        self.releases += 1
        if not self.opens:
            self.open_now.discard(self)
            if self.unused is not None:
                self.unused.set()
