"""Runs what an image needs for as long as it is served, and ends it: counting, commits, its profile and its stream.

Owns these tasks, the look whether the file is still what was opened, and what is to be reported of images whose last
flush has failed. Must not know how an overlay is found, nor under which name it is served.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import trio

from qedfs.errors import BadOverlay, QedfsError
from qedfs.image.boot_profile import Range
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.jobs.prefetch import replay
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from qedfs.mount.opener import Opener
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.served import Served

log = logging.getLogger(__name__)

INSPECT_SECONDS = 1.0  # between two looks whether an overlay file is still what it was: 5 us each
# Overlays that are closed at once at the end: flushes wait for the disk, which takes many together.
CLOSING = 16


class Supervisor:
    """What runs for the images of one mount."""

    def __init__(self, folder: OverlayFolder, opener: Opener, profile: Sequence[Range], nursery: trio.Nursery) -> None:
        """`profile`: what to bring in first. `nursery` runs the images' tasks."""
        self._folder = folder
        self._opener = opener
        self._profile = profile
        self._nursery = nursery
        self.losses: list[QedfsError] = []  # why answered writes may not be in an overlay that was closed
        self.ending = 0  # images that are being closed because their overlay has left

    def start(self, served: Served) -> None:
        """Run the tasks of one image."""
        self._nursery.start_soon(self._run, served)

    async def end(self, served: Served) -> None:
        """End the tasks of an image whose overlay has left the folder, and close it."""
        served.scope.cancel()
        self.ending += 1
        try:
            # Looked at now: a closed file tells nothing.
            deleted = served.is_deleted()
            if (error := await self._closed(served)) and not deleted:
                self.losses.append(error)
            if served.image is not None:
                await self._opener.let_go(served.image)
        finally:
            self.ending -= 1

    async def end_all(self, everything: Iterable[Served]) -> None:
        """End the tasks of all images, and close these, some at once."""
        places = trio.CapacityLimiter(CLOSING)

        async def end(served: Served) -> None:
            async with places:
                served.scope.cancel()
                if error := await self._closed(served):
                    self.losses.append(error)

        async with trio.open_nursery() as nursery:
            for served in everything:
                nursery.start_soon(end, served)

    async def _closed(self, served: Served) -> QedfsError | None:
        return None if served.image is None else await self._opener.close(served.image)

    async def _run(self, served: Served) -> None:
        """The tasks of one image: counting, committing, streaming."""
        image, job = served.image, served.job
        if image is None or job is None:
            return
        with served.scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(image.run)
                    nursery.start_soon(self._inspect, image, job, served)
                    nursery.start_soon(replay, image, self._profile)
                    try:
                        await image.overlay.count_missing()
                    except QedfsError as exc:
                        # The image goes on being read, written and committed as far as it can be.
                        job.fail(exc)
                    if image.overlay.damage is not None and job.error is None:
                        job.fail(image.overlay.damage)
                    if job.state is not State.COMPLETE:
                        await job.run()
                        await self._opener.let_go(image)
            except* QedfsError as group:
                error = QedfsError("; ".join(str(exc) for exc in group.exceptions))
                image.condition.note(Cause.INTERNAL_ERROR, error)
                log.error("%s: %s", served.name, error)
            except* Exception as group:
                # A fault of ours must cost this image's stream only, not every image of the mount.
                image.condition.note(Cause.INTERNAL_ERROR, QedfsError("internal error, see the log"))
                log.error("%s: internal error", served.name, exc_info=group)

    async def _inspect(self, image: Image, job: StreamJob, served: Served) -> None:
        """Notice what others do to the file, until it is no longer what was opened; then it is not complete either."""
        while True:
            await trio.sleep(INSPECT_SECONDS)
            try:
                await image.overlay.inspect()
                self._check_place(image, served)
            except BadOverlay as exc:
                if image.overlay.damage is None:
                    image.condition.note(Cause.REPLACED, exc)
                job.fail(exc)
                return
            except QedfsError as exc:
                # The disk, or a file server that is away: it proves nothing, and whoever reads meets it too.
                log.debug("%s: cannot be looked at: %s", image.name, exc)

    def _check_place(self, image: Image, served: Served) -> None:
        """Raise BadOverlay if the single overlay's path leads to another file. (A folder takes that one up instead.)

        Whoever waits for the image means the file that has the name. One that was removed is legal: it lives for as
        long as it is mounted.
        """
        if not self._folder.single:
            return
        try:
            found = self._folder.lstat(served.path)
        except OSError:
            return
        if not served.is_on(found):
            fate = "has another name" if image.overlay.file_status().st_nlink else "ends with the mount"
            raise BadOverlay(
                f"{served.path}: is another file now; what is mounted is the one that was there, which {fate}"
            )
