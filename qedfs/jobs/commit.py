"""The commit job: the backing gets the clusters of the overlay, which the overlay then drops, while guests go on.

Owns how fast, and in which order clusters are visited. How a commit survives whatever happens is in
`image/live_commit.py`. Must not know who controls it.

It walks the image twice: the backing gets what it does not have; then, when that is durable, the overlay drops what is
the same in both. What a guest writes to a cluster after that was copied stays in the overlay, as do new clusters behind
the first walk. Another commit takes them. So the job ends, however much guests write.

A request to a file system that is frozen, or whose disk hangs, cannot be abandoned. Guests go on meanwhile, but the job
ends, and its server, only when that has been answered. So its reason says what it waits for, also after a cancel.

While guests read or write, one step of the second walk is taken per GUEST_SECONDS, as it keeps the event loop from
them.
"""

from __future__ import annotations

import logging
from typing import ClassVar, Unpack

import trio

from qedfs.image.image import Image
from qedfs.image.live_commit import PIECE_BYTES, LiveCommit
from qedfs.jobs.job import Job, JobOptions
from qedfs.jobs.state import Event
from qedfs.units import format_size

log = logging.getLogger(__name__)

DROP_BYTES = 128 << 10  # compared at once, on the event loop
DROPPED_AT_ONCE = 4096  # clusters, before that is committed and their space given back
GUEST_SECONDS = 0.002
SILENT_SECONDS = 5.0  # without an answer of the backing's file system, before that is told
PACE_SECONDS = 0.25


class CommitJob(Job):
    """The commit of one image. It exists from a command until it has ended."""

    kind: ClassVar[str] = "commit"
    writes_source: ClassVar[bool] = True

    def __init__(self, image: Image, **options: Unpack[JobOptions]) -> None:
        """See `Job`. Raises a QedfsError if the image, as it is, cannot be committed."""
        super().__init__(image, **options)
        self.keep = False  # whether the overlay keeps its clusters
        self.copied_bytes = 0  # of the overlay, of which the backing got what it did not have
        self.dropped_bytes = 0
        self._commit = LiveCommit(image)
        self._clusters = self._commit.clusters
        self._copied = self._dropped = 0  # how many clusters have been visited for either
        self._uncommitted = 0  # clusters that were dropped since
        self._silence = ""  # what it was said to wait for

    @property
    def progress(self) -> int:
        """How far it is in the image, in bytes: half of it when all has been copied."""
        if self.finished or not self._clusters:
            return self.image.size
        passed = self._copied if self.keep else (self._copied + self._dropped) / 2
        return int(self.image.size * passed / self._clusters)

    async def run(self, *, once: bool = False) -> None:
        """See `Job.run`. At the end, the image has an ordinary source again."""
        self.image.committing_down = True
        async with trio.open_nursery() as nursery:
            # Shielded: the end of the server waits for the same answer.
            watch = trio.CancelScope(shield=True)
            nursery.start_soon(self._tell_of_silence, watch)
            try:
                await super().run(once=once)
            finally:
                with trio.CancelScope(shield=True):
                    await self._commit.leave()
                self.image.committing_down = False
                watch.cancel()

    async def _tell_of_silence(self, watch: trio.CancelScope) -> None:
        with watch:
            while True:
                await trio.sleep(1)
                asked = self._commit.asked_since
                if asked is None or trio.current_time() - asked < SILENT_SECONDS or self._silence:
                    continue
                self._silence = f"the file system of the backing {self._commit.place} does not answer: is it frozen?"
                log.warning("%s: the commit waits: %s", self.image.name, self._silence)
                self._report(Event.WAIT, self._silence)
                self.reason = self._silence  # also of a job that has been told to end, whose state stays

    async def work(self) -> bool:
        """See `Job.work`. An error keeps what was reached."""
        if await self._commit.doubted():
            self._copied = 0
        if not self._commit.open:
            self._copied = 0
            await self._commit.begin()
        if not await self._copy():
            return False
        if not self._commit.settled:
            await self._commit.settle()
        return self.keep or await self._drop()

    async def _copy(self) -> bool:
        while self._copied < self._clusters:
            if not await self._paced():
                return False
            most = min(self.rate_limiter.piece_bytes, PIECE_BYTES)
            following, size = await self._commit.copy(self._copied, int(most) // self.image.overlay.cluster_size)
            self._copied = self.cursor = following
            self.copied_bytes += size
            self.rate_limiter.sent(size)
            await self._heard(size)
        return True

    async def _drop(self) -> bool:
        overlay = self.image.overlay
        most = max(1, DROP_BYTES // overlay.cluster_size)
        while self._dropped < self._clusters:
            if not await self._paced():
                return False
            first = self._dropped
            if gap := await overlay.gap(first):
                self._dropped = min(self._clusters, first + gap)
                continue
            count = min(most, self._clusters - first)
            dropped = await self._commit.drop(first, count)
            if dropped is None:
                continue
            self._dropped = first + count
            self.dropped_bytes += dropped * overlay.cluster_size
            self._uncommitted += dropped
            if self._uncommitted >= DROPPED_AT_ONCE:
                await self._give_back()
            await self._heard(dropped)
            if dropped and self.guests_were_active():
                await self.sleep(GUEST_SECONDS)
        return True

    async def finish(self) -> None:
        """Let the file have all of it, and give the space back."""
        await self._give_back()
        got, went = format_size(self.copied_bytes), format_size(self.dropped_bytes)
        log.info("%s: committed into its backing, %s compared, %s dropped", self.image.name, got, went)

    async def _paced(self) -> bool:
        """Wait for the limit. Returns whether to go on."""
        while self.allowed and not self.hold_off():
            if not (due := self.rate_limiter.due()):
                return True
            await self.sleep(min(due, PACE_SECONDS))
        return False

    async def _heard(self, size: int) -> None:
        """Other tasks get their turn, and a failure is over if there was progress."""
        if size and (self.hindered or self._silence):
            self._silence = ""
            self.makes_progress()
        await trio.lowlevel.checkpoint()

    async def _give_back(self) -> None:
        """Make what was dropped durable, and give its space back."""
        self._uncommitted = 0
        await self.image.overlay.commit_and_give_back()
