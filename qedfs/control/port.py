"""What the control side sees of a mount: a few names and the images. Implemented in `mount/`, which starts us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob


class ServedImage(Protocol):
    """One overlay of the mount. `image` and `job` are None, and `error` says why, if it cannot be served.

    Without an error as well it has only just appeared, and will be opened once it has come to rest.
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
    def job(self) -> StreamJob | None:
        """Its stream."""
        ...

    @property
    def error(self) -> QedfsError | None:
        """Why it is not served."""
        ...

    @property
    def opens(self) -> int:
        """How many times it is open at the moment."""
        ...


class Mounted(Protocol):
    """A mount that is being served."""

    @property
    def mountpoint(self) -> str:
        """Where, as an absolute path."""
        ...

    @property
    def device(self) -> str:
        """Which file system it is, as in /proc/self/mountinfo: "0:57"; "" if unknown."""
        ...

    def everything(self) -> Sequence[ServedImage]:
        """All overlays that were found, by name."""
        ...

    def fetches(self) -> Sequence[FetchQueue]:
        """The fetch queues in use."""
        ...

    async def rescan(self) -> None:
        """Look into the folder again. Raises QedfsError."""
        ...

    def quit(self) -> None:
        """Begin to unmount and stop."""
        ...
