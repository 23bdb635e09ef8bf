"""The images of one mount: puts folder, sources, opener, supervisor and registry together, and ends them in order.

Must not know FUSE, nor how long the mount goes on.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from qedfs.errors import QedfsError
from qedfs.jobs.idle import Idle, Pressure
from qedfs.mount.open_images import OpenImages
from qedfs.mount.opener import Opener
from qedfs.mount.options import Options
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.registry import Registry
from qedfs.mount.source_pool import SourcePool
from qedfs.mount.supervisor import Supervisor


class Images:
    """All that one mount serves. `registry` says what there is, `sources` what it is filled from."""

    def __init__(
        self, source: str, options: Options, nursery: trio.Nursery, *, forget: Callable[[str], None] = lambda _: None
    ) -> None:
        """`source`: a folder of overlays, or one overlay file. `nursery` runs the images' tasks.

        `forget`: told the name of an image that is no longer there, which the kernel may still know.

        Raises:
            UsageError: it is not there.
        """
        self.folder = OverlayFolder(source)
        self.sources = SourcePool(
            self.folder.root,
            options.policy,
            options.deadline_seconds,
            nursery,
            pinning=options.pinning,
            credentials=options.credentials,
        )
        images = OpenImages()
        idle = Idle(options.rules, Pressure(images.barrier_seconds), images.activity)
        opener = Opener(self.folder, options, self.sources, images, idle.reason)
        self._supervisor = Supervisor(self.folder, opener, options.profile, nursery)
        self.registry = Registry(self.folder, opener, self._supervisor, forget)

    async def close(self) -> list[QedfsError]:
        """Flush and close every overlay, then drop the connections.

        Returns why what was written may not be in the overlays, for each that was closed in this mount, now or before.
        """
        await self._supervisor.end_all(self.registry.known())
        await self.sources.aclose()
        self.folder.close()
        return self._supervisor.losses
