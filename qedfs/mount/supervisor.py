"""Runs the tasks of each image while it is served: count, profile, stream and other jobs; commits, inspection.

Owns these tasks, the order in which an image ends, and the errors of images whose last flush has failed. Must not know
how overlays are found.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from qedfs.errors import BadOverlay, QedfsError
from qedfs.image.boot_profile import Range
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.jobs.image_jobs import ImageJobs
from qedfs.jobs.prefetch import replay
from qedfs.jobs.state import State
from qedfs.mount.opener import Opener
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.rounds import Rounds, Visited
from qedfs.mount.served import Served

log = logging.getLogger(__name__)

MAX_CLOSING = 16  # overlays that are closed at the same time, so that the disk can combine their flushes


class Supervisor:
    """The tasks of the images of one mount."""

    def __init__(
        self,
        folder: OverlayFolder,
        opener: Opener,
        profile: Sequence[Range],
        nursery: trio.Nursery,
        activation: Callable[[Served], Callable[[], Awaitable[None]]],
        tell: Callable[[Served], None],
    ) -> None:
        """`profile`: ranges to populate first. `nursery` runs the tasks.

        `activation`: makes what a write calls that activates its image. `tell`: see `Visited`.
        """
        self._folder = folder
        self._opener = opener
        self._profile = profile
        self._nursery = nursery
        self._activation = activation
        self._tell = tell
        self.open_now: set[Served] = set()  # the images that are open
        self.opened: set[Served] = set()  # those that were opened since the last round
        self._rounds = Rounds(self.opened)
        nursery.start_soon(self._rounds.run)
        self.losses: list[QedfsError] = []  # one per overlay that may lack acknowledged writes
        self.ending = 0  # images that are being closed because their overlay was removed

    def start(self, served: Served) -> None:
        """Run the tasks of an image."""
        if served.image is not None and served.image.gate is not None:
            served.image.gate.activate = self._activation(served)
        self._nursery.start_soon(self._run, served)

    async def end(self, served: Served) -> QedfsError | None:
        """Stop the tasks of an image that has left the mount, and close it.

        Returns an error if its last writes are lost. Those of a deleted file are no loss.
        """
        served.scope.cancel()
        self.ending += 1
        try:
            # Asked before the file is closed, because this needs its descriptor.
            deleted = served.is_deleted()
            error = None if (found := await self._closed(served)) and deleted else found
            if error is not None:
                self.losses.append(error)
            if served.image is not None:
                await self._opener.release_source(served.image)
            return error
        finally:
            self.ending -= 1

    async def end_all(self, everything: Iterable[Served]) -> None:
        """Stop the tasks of all images, and close up to MAX_CLOSING images at the same time."""
        places = trio.CapacityLimiter(MAX_CLOSING)

        async def end(served: Served) -> None:
            async with places:
                served.scope.cancel()
                if error := await self._closed(served):
                    self.losses.append(error)

        async with trio.open_nursery() as nursery:
            for served in everything:
                nursery.start_soon(end, served)

    async def _closed(self, served: Served) -> QedfsError | None:
        if served.recording is not None:
            # An activation that came too late is taken back by a second record: without it, the next mount is active.
            await served.recording.wait()
        return None if served.image is None else await self._opener.close(served.image)

    async def _run(self, served: Served) -> None:
        """The tasks of one image."""
        image, jobs = served.image, served.jobs
        if image is None or jobs is None:
            return
        stream = jobs.stream
        with served.scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._visit, image, jobs, served, nursery)
                    nursery.start_soon(jobs.run)
                    nursery.start_soon(replay, image, self._profile)
                    try:
                        await image.overlay.count_missing()
                    except QedfsError as exc:
                        # Reads, writes and commits go on as far as they can.
                        stream.fail(exc)
                    if image.overlay.damage is not None and stream.error is None:
                        stream.fail(image.overlay.damage)
                    if stream.state is not State.COMPLETE:
                        await stream.run()
                        await self._opener.release_source(image)
            except* QedfsError as group:
                error = QedfsError("; ".join(str(exc) for exc in group.exceptions))
                log.error("%s: %s", served.name, error)
                _end_jobs(image, jobs, error)
            except* Exception as group:
                # A bug must cost the tasks of this image only, not every image of the mount.
                log.error("%s: internal error", served.name, exc_info=group)
                _end_jobs(image, jobs, QedfsError("internal error, see the log"))

    async def _visit(self, image: Image, jobs: ImageJobs, served: Served, nursery: trio.Nursery) -> None:
        """Have the image in the rounds until cancelled."""
        visited = Visited(
            served,
            image,
            nursery,
            lambda: self._inspect(image, jobs, served),
            always=self._folder.single,
            tell=self._tell,
        )
        self._rounds.add(visited)
        try:
            await trio.sleep_forever()
        finally:
            self._rounds.leave_out(visited)

    async def _inspect(self, image: Image, jobs: ImageJobs, served: Served) -> bool:
        """Check whether the file was damaged or replaced. If so, fail the jobs and return False."""
        try:
            await image.overlay.inspect()
            self._check_path(image, served)
        except BadOverlay as exc:
            if image.overlay.damage is None:
                image.condition.note(Cause.REPLACED, exc)
            image.condition.look()  # since when there is damage
            jobs.fail(exc)
            return False
        except QedfsError as exc:
            # An error of the disk or of a file server does not prove any damage, and readers will get it too.
            log.debug("%s: cannot be looked at: %s", image.name, exc)
        return True

    def _check_path(self, image: Image, served: Served) -> None:
        """Raise BadOverlay if the path of a single overlay leads to another file. (In a folder, the scan notices it.)

        Users who wait for the image mean the file at that path. A removed overlay is no error: the file exists until it
        is closed.
        """
        if not self._folder.single:
            return
        try:
            found = self._folder.lstat(served.path)
        except OSError:
            return
        if not served.is_on(found):
            fate = "has another name" if image.overlay.file_status().st_nlink else "was removed and ends with the mount"
            raise BadOverlay(f"{served.path}: is another file now; the mounted one {fate}")


def _end_jobs(image: Image, jobs: ImageJobs, error: QedfsError) -> None:
    """Let everybody know that an image has no tasks any more: a job that looks as if it ran would be waited for."""
    image.condition.note(Cause.INTERNAL_ERROR, error)
    for job in jobs.all():
        if job.state is not State.COMPLETE:
            job.fail(error)
