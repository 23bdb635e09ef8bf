"""The images of one mount: creates folder, sources, opener, supervisor and registry, and closes them in order.

Must not know FUSE, nor when the mount ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from qedfs.errors import QedfsError
from qedfs.jobs.idle import Idle, Pressure
from qedfs.mount import failed_barriers, stream_orders
from qedfs.mount.cut_over import CutOver, DropPages
from qedfs.mount.held import HolderLink
from qedfs.mount.inode_numbers import InodeNumbers
from qedfs.mount.late_records import LateRecords
from qedfs.mount.open_images import OpenImages
from qedfs.mount.opener import Opener
from qedfs.mount.options import Options
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.registry import Registry
from qedfs.mount.release import DropName, Releases
from qedfs.mount.released import Released
from qedfs.mount.served import Served
from qedfs.mount.snapshot import Snapshots
from qedfs.mount.source_move import SourceMoves
from qedfs.mount.source_pool import SourcePool
from qedfs.mount.supervisor import Supervisor


async def no_pages(_: Served) -> None:
    """Without a mount, the kernel has no pages."""


async def no_name(_: str) -> None:
    """Nor names."""


class Images:
    """All that one mount serves. `registry`: the overlays and images. `sources`: what they are filled from."""

    def __init__(  # noqa: PLR0913 - what it asks of the kernel and of the holder
        self,
        source: str,
        options: Options,
        nursery: trio.Nursery,
        *,
        forget: Callable[[str], None] = lambda _: None,
        drop_pages: DropPages = no_pages,
        drop_name: DropName = no_name,
        link: HolderLink | None = None,
        values: Mapping[str, str] | None = None,
    ) -> None:
        """`source`: a folder of overlays, or one overlay file. `nursery` runs the tasks of images and connections.

        `forget`: called with the name of an image that is removed, which the kernel may have cached. `drop_pages`,
        `drop_name`: let the kernel drop the pages of an image, and the name of one that was released. `link`, `values`:
        to the holder of the mount, and what an earlier server has told of it.

        Raises:
            UsageError: `source` cannot be opened.
        """
        self.folder = OverlayFolder(source)
        self.sources = SourcePool(
            self.folder.root,
            options.policy,
            options.deadline_seconds,
            nursery,
            pinning=options.pinning,
            credentials=options.credentials,
            limit_total=options.limit_total,
        )
        images = OpenImages()
        idle = Idle(options.rules, Pressure(images.barrier_seconds), images.activity)
        link, told = link or HolderLink(), values or {}
        late = LateRecords(link, told)
        opener = Opener(self.folder, options, self.sources, images, idle.reason, late)
        self.snapshots = Snapshots(self.folder)
        self.moves = SourceMoves(self.sources, images)
        self.cut_over = CutOver(self.sources, images, options, nursery, drop_pages, late)
        self._supervisor = Supervisor(
            self.folder,
            opener,
            options.profile,
            nursery,
            self.cut_over.activation,
            tell=self._tell,
        )
        self._link = link
        if "limit-total" in told:
            self.sources.total.limiter.limit = int(told["limit-total"])
        self._numbers = InodeNumbers(self._link, told)
        self.released = Released(self.folder, self._link, told)
        self.registry = Registry(self.folder, opener, self._supervisor, forget, self._numbers, told, self.released)
        self.releases = Releases(self.registry, self.released, nursery, drop_name, single=self.folder.single)

    def note(self) -> None:
        """Tell the holder what the next server has to know."""
        for served in self.registry.including_removed():
            self._tell(served)
        self.note_total()

    def note_total(self) -> None:
        """The same, of what belongs to no image. Of an image, the rounds tell it (`rounds.py`)."""
        self._link.set("limit-total", str(self.sources.total.limiter.limit))

    def _tell(self, served: Served) -> None:
        self._numbers.note(served)
        stream_orders.note(self._link, served)
        failed_barriers.note(self._link, served)

    def note_closed(self) -> None:
        """Tell the holder that all images were closed for the next server."""
        for served in self.registry.including_removed():
            self._numbers.note_closed(served)
            failed_barriers.note(self._link, served)  # the last flush may have failed

    async def close(self) -> list[QedfsError]:
        """Flush and close every overlay, then close the connections.

        Returns an error for each overlay, open or closed earlier, that may lack acknowledged writes.
        """
        await self.releases.stop()
        await self._supervisor.end_all(self.registry.including_removed())
        await self.sources.aclose()
        self.released.close()
        self.folder.close()
        return self._supervisor.losses
