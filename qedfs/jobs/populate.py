"""Populates an image from another copy of its source: a rescue, if the source is gone for good.

Owns the check of the copy, the walk over what is missing, and the end: an image that lacks nothing drops its backing.
Must not know how the copy is opened. It is no `Job` of the image, as it must run while the stream waits for a source
that is away, or has failed because of it.

- Only clusters that are missing are stored, as fetched ones are (`Overlay.adopt`): never over a write or a discard.
- While it runs, requests that the source does not answer are answered from the copy (`Image.rescue`), also those that
  wait already. Without that, a partial write that waits would keep its cluster from being populated.
- Before a byte is used, the size is compared, and blocks that were fetched from the source, in this session or an
  earlier one (`source/evidence.py`). Without any such block, only an image of which nothing was kept is populated.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence

import trio

from qedfs.errors import QedfsError, SourceChanged, SourceError
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share
from qedfs.image.commit_schedule import COMMIT_BYTES
from qedfs.image.image import Image
from qedfs.image.known_blocks import is_raw, keeps_nothing, known_blocks
from qedfs.jobs.missing import MissingRuns
from qedfs.source.base import Extent
from qedfs.source.evidence import difference
from qedfs.source.retrying import RetryingSource

log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
AGAIN_SECONDS = 0.25  # between two walks, if writes had claimed what is missing


class Progress(enum.StrEnum):
    """How far it is."""

    CHECKING = "checking"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"


class _Runs(MissingRuns):
    """What is missing, with the holes of the copy."""

    def __init__(self, image: Image, copy: RetryingSource) -> None:
        super().__init__(image)
        self._copy = copy

    def request_bytes(self) -> int:
        return PIECE_BYTES

    async def told(self, pos: int, size: int) -> Sequence[Extent] | None:
        return await self._copy.extents(pos, size)


class Populate:
    """One rescue of one image."""

    def __init__(self, image: Image, copy: RetryingSource, *, force: bool) -> None:
        """`copy`: closed at the end. `force`: do not compare blocks."""
        self.copy = copy
        self.state = Progress.CHECKING
        self.error: QedfsError | None = None
        self.done = 0  # bytes that it has stored
        self._image = image
        self._force = force
        self._scope = trio.CancelScope()

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.state in (Progress.CHECKING, Progress.RUNNING)

    def cancel(self) -> None:
        """End it. What was populated stays."""
        self._scope.cancel()

    async def run(self) -> None:
        """Run to the end. Errors are kept, not raised."""
        image = self._image
        try:
            with self._scope:
                await self._check()
                self.state = Progress.RUNNING
                image.rescue = self
                image.stalls.wake()
                await self._populate()
                self.state = Progress.COMPLETE
                log.info("%s: complete, populated from %s", image.name, self.copy.location)
            if self._scope.cancelled_caught:
                self.state = Progress.CANCELLED
        except QedfsError as exc:
            self._fail(exc)
        except Exception:
            # A bug must end this rescue only.
            log.exception("%s: cannot populate", image.name)
            self._fail(QedfsError("internal error, see the log"))
        finally:
            if self.active:
                self.state = Progress.CANCELLED
            if image.rescue is self:
                image.rescue = None
            with trio.CancelScope(shield=True):
                await self.copy.aclose()

    def _fail(self, error: QedfsError) -> None:
        self.error, self.state = error.fresh(), Progress.FAILED
        log.error("%s: cannot populate: %s", self._image.name, error)

    async def read(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view with the copy's bytes at its position, and with zeros past its end. See `Rescue`."""
        size = (await self.copy.connect()).size
        for pos, view in pieces:
            wanted = max(0, min(len(view), size - pos))
            if wanted:
                await self.copy.read(pos, view[:wanted], urgent=True)
            view[wanted:] = bytes(len(view) - wanted)

    async def _check(self) -> None:
        image = self._image
        size = (await self.copy.connect()).size
        known = None if image.version is None else image.version.size
        if known is not None and size != known:
            raise SourceChanged(f"{self.copy.location} has {size} bytes, the backing of {image.name} has {known}")
        if known is None and size != image.size and not self._force:
            raise SourceChanged(
                f"{self.copy.location} has {size} bytes, {image.name} has {image.size};"
                " --force if it is the right disk all the same"
            )
        if self._force:
            return
        different = await difference(self.copy, known_blocks(image), of_raw=is_raw(image))
        if different:
            raise SourceChanged(
                f"{self.copy.location} is not the disk that {image.name} was started from ({different});"
                " nothing of it is used"
            )
        if different is None and not await keeps_nothing(image):
            raise SourceError(
                f"no block of the backing of {image.name} is known that {self.copy.location} could be compared"
                " with; --force if it is the right disk"
            )

    async def _populate(self) -> None:
        """Populate everything, then drop the backing."""
        image = self._image
        size = (await self.copy.connect()).size
        runs = _Runs(image, self.copy)
        while not image.complete:
            before, cursor = self.done, 0
            while (run := await runs.next_run(cursor, size)) is not None:
                cursor = run[0] + await self._bring(*run, size)
            if await runs.next_run(0, size) is None:
                with image.consumer.adopting():
                    self._check_active()
                    await image.detach()
                _abandon_source(image)
            elif self.done == before:
                await trio.sleep(AGAIN_SECONDS)  # writes have claimed what is left

    def _check_active(self) -> None:
        """Raise QedfsError if nothing may be kept any more. No await may follow before the adoption begins."""
        if self._image.closed or self._image.gate is not None:
            raise QedfsError(f"{self._image.name}: is in standby again, or closed; nothing more is kept")

    async def _bring(self, first: int, count: int, size: int) -> int:
        """Populate a run, or as much of it as there is memory for. Returns how many clusters that was."""
        image, overlay = self._image, self._image.overlay
        cluster_size = overlay.cluster_size
        count = max(1, min(count, PIECE_BYTES // cluster_size))
        pos = first * cluster_size
        wanted = min(count * cluster_size, image.size - pos)
        share = Share(memory_pool.FETCHED)
        while not share.fits(wanted):
            await share.change()
        share.take(wanted)
        try:
            buffer = bytearray(wanted)
            await self.read([(pos, memoryview(buffer))])
            with image.consumer.adopting():
                self._check_active()
                kept = await overlay.adopt(pos, buffer, wanted, cold=True)
        finally:
            share.close()
        self.done += kept
        image.counters.kept_stream += kept
        if overlay.uncommitted_bytes >= COMMIT_BYTES:
            await overlay.commit()
        return count


def _abandon_source(image: Image) -> None:
    """End whatever still waits for the source of an image that has become complete."""
    if image.fetch is not None:
        image.fetch.part(image.consumer)
    if image.version is not None:
        image.version.close()
    image.reads.waiting.run_again()
