"""The interface through which control sees a mount.

Owns the protocols, and has no logic. `mount/` implements them and starts the servers of this room, which must not know
`mount/`: whatever a command needs of it is declared here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.total_limit import TotalLimit
from qedfs.image.condition import Trouble
from qedfs.image.image import Image
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.job import Job


class Restart(Protocol):
    """The last change of the servers of a mount."""

    @property
    def reason(self) -> str:
        """How the server before this one has ended."""
        ...

    @property
    def count(self) -> int:
        """How many servers have taken this mount over."""
        ...

    @property
    def pause_seconds(self) -> float:
        """How long the mount has answered nothing."""
        ...

    @property
    def kinds(self) -> Mapping[str, int]:
        """The count, by what had ended the earlier servers: "upgrade", "killed", "error", "hung"."""
        ...


class Snapshot(Protocol):
    """A copy of an overlay."""

    @property
    def file(self) -> str:
        """Where it is."""
        ...

    @property
    def pause_seconds(self) -> float:
        """How long writes have waited for it."""
        ...


class ServedImage(Protocol):
    """One overlay of the mount. If it cannot be served, `image`, `job` and `jobs` are None and `error` says why.

    If `error` is None as well, the file has just appeared, and is opened when it is no longer being changed.
    """

    @property
    def name(self) -> str:
        """File name inside the mount, like disk.raw."""
        ...

    @property
    def path(self) -> str:
        """The overlay file."""
        ...

    @property
    def image(self) -> Image | None:
        """The served image."""
        ...

    @property
    def job(self) -> Job | None:
        """The job that makes the image complete, whose state is the image's."""
        ...

    @property
    def jobs(self) -> ImageJobs | None:
        """All jobs of the image, and the way to begin another one."""
        ...

    @property
    def error(self) -> QedfsError | None:
        """Why it is not served."""
        ...

    @property
    def troubles(self) -> Sequence[Trouble]:
        """What is wrong with it now, served or not, the most lasting first."""
        ...

    @property
    def opens(self) -> int:
        """How many times the image is open now."""
        ...

    @property
    def releasing(self) -> bool:
        """Whether it leaves the mount once nobody has it open."""
        ...


class Mounted(Protocol):
    """A mount that is being served."""

    @property
    def mountpoint(self) -> str:
        """The absolute path of the mountpoint."""
        ...

    @property
    def device(self) -> str:
        """The device number as in /proc/self/mountinfo, such as "0:57"; "" if unknown."""
        ...

    @property
    def without_more(self) -> str:
        """Why lseek(SEEK_DATA, SEEK_HOLE) and fallocate (TRIM) are not answered; "" if they are."""
        ...

    @property
    def restart(self) -> Restart | None:
        """The last time that another server took the mount over; None if that has not happened."""
        ...

    @property
    def without_restart(self) -> str:
        """Why a crash of the server ends the mount; "" if another server takes it over."""
        ...

    @property
    def without_upgrade(self) -> str:
        """Why no other server can take the mount over from one that lives; "" if one can."""
        ...

    async def upgrade(self) -> None:
        """Let another server take the mount over, which is ready when this returns. Raises QedfsError."""
        ...

    def everything(self) -> Sequence[ServedImage]:
        """All overlays that were found, served or not, sorted by name.

        The same object as the last time only if none has come or gone since.
        """
        ...

    def fetches(self) -> Sequence[FetchQueue]:
        """The fetch queues in use."""
        ...

    @property
    def total(self) -> TotalLimit:
        """The limit of all images together."""
        ...

    async def activate(self, served: ServedImage, *, dry: bool = False) -> None:
        """End the standby of an image; `dry`: only find out whether that would work. Does nothing if it is active.

        Raises a QedfsError if it cannot be activated, and then it is in standby.
        """
        ...

    async def deactivate(self, served: ServedImage) -> None:
        """Put an image back in standby, and drop what it has got since it was activated.

        Raises a QedfsError if that is not possible, and then it is active.
        """
        ...

    async def move_source(self, served: ServedImage, place: str, *, force: bool = False) -> None:
        """Give an image another address of its source, a URL or an absolute path. Raises a QedfsError."""
        ...

    async def resize(self, served: ServedImage, size: int) -> None:
        """Let an image grow to `size` bytes, and let the kernel know. Raises a QedfsError."""
        ...

    async def populate(
        self, served: ServedImage, place: str, *, backing_format: str | None = None, force: bool = False
    ) -> None:
        """Begin to populate what an image lacks from the file or URL `place`. Raises a QedfsError."""
        ...

    def released(self) -> Mapping[str, str]:
        """The overlay of each image that was released, by the name of the image."""
        ...

    async def release(self, served: ServedImage) -> bool:
        """Take a complete image out of the mount once nobody has it open, and free its overlay.

        Returns whether that is done, without waiting for those who have it open. Raises a QedfsError if it stays.
        """
        ...

    async def snapshot(self, served: ServedImage, file: str) -> Snapshot:
        """Copy the overlay of an image, as it is at one moment, to the absolute path `file`. Raises a QedfsError."""
        ...

    async def take_back(self, name: str) -> bool:
        """Serve an image on, or again, that is to be released, or was. Returns whether there was one.

        Raises the QedfsError because of which it cannot be served.
        """
        ...

    async def rescan(self) -> None:
        """Scan the folder again. Raises QedfsError."""
        ...

    def quit(self) -> None:
        """Start to unmount and stop."""
        ...
