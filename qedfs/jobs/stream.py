"""The stream: brings in what an image is missing, then lets the overlay forget its backing.

Owns the order in which clusters are brought in, and when a request may leave. What all jobs have in common is in
`job.py`. Must not know who drives it.

The stream walks the map from the start. A run of missing clusters becomes background requests as the fetch queue gives
it turns; holes of the source are dealt with on the way (`missing.py`). When a walk has found nothing more to do and all
flights have landed, the image is complete.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

from qedfs.errors import QedfsError
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.jobs.job import RETRY_SECONDS, Driver, HoldOff, Job, never
from qedfs.jobs.missing import MissingRuns
from qedfs.jobs.state import State

log = logging.getLogger(__name__)

PACE_SECONDS = 0.25
# Keep every fetched byte from being kept, until the overlay is opened again.
_LOSSES = (Cause.BARRIER_FAILED, Cause.SOURCE_CHANGED)
# May be over with the next try.
_FAILURES = (Cause.NO_SPACE, Cause.NOT_BEGUN, Cause.COMMIT_FAILED, Cause.NOT_KEPT, Cause.FETCH_FAILED)


class StreamJob(Job):
    """The stream of one image. It is there as long as its image."""

    kind: ClassVar[str] = "stream"

    def __init__(
        self,
        image: Image,
        *,
        enabled: bool = True,
        limit: int = 0,
        hold_off: HoldOff = never,
        driver: Driver | None = None,
    ) -> None:
        """See `Job`. A pause that the overlay remembers holds the stream."""
        super().__init__(
            image,
            enabled=enabled and image.overlay.writable,
            limit=limit,
            hold_off=hold_off,
            driver=driver,
            state=State.COMPLETE if image.complete else State.OFF,
            paused=image.overlay.record.paused,
        )
        self._looked_at = -1  # bytes that had been kept and written when a stream that failed was last looked at
        self._known_failures = 0  # of the image, that have been dealt with
        self._trying = False  # after a failure: go carefully
        self._passed_over = False  # the last walk has left clusters to writes that are under way
        self._missing = MissingRuns(image)

    # How far it is.

    @property
    def done(self) -> bool:
        """Whether the image needs its backing no longer."""
        return self.image.complete

    @property
    def total(self) -> int:
        """Bytes of the image."""
        return self.image.size

    @property
    def progress(self) -> int:
        """Bytes that need the source no longer."""
        return min(self.image.size, self.image.populated + self._missing.skipped)

    async def next_missing(self, pos: int) -> int | None:
        """The first byte at or after `pos` that needs the source; None: there is none."""
        return await self._missing.first_from(pos)

    async def step(self, pos: int) -> tuple[int, int, int | None]:
        """Populate the next missing run at or after `pos` with one request.

        Returns (pos, size, next): what was populated and where the next missing cluster is, None if there is none. A
        size of 0 says that nothing was missing. Errors of the source and of the overlay.
        """
        image, fetch = self.image, self.image.fetch
        cluster_size = image.overlay.cluster_size
        if image.complete or fetch is None:
            return pos, 0, None
        source_size = await image.source_size()
        run = await self._missing.next_run(pos // cluster_size, source_size)
        if run is None:
            return pos, 0, None
        first, count = run
        start = first * cluster_size
        size = min(count * cluster_size, image.size - start)
        async with fetch.waiting():
            flights = await fetch.bring(first, count, consumer=image)
        await fetch.adopted(flights, consumer=image)
        self._raise(*_LOSSES, Cause.NO_SPACE)
        if image.overlay.all_missing(first, count) and not image.overlay.pending(first, count):
            self._raise(*_FAILURES)
            raise QedfsError(f"{image.name}: what was fetched could not be kept")
        following = await self._missing.next_run(first + count, source_size)
        if following is None and await self._missing.next_run(0, source_size) is None:
            # Whoever owns the pace has come to the end: nothing needs the backing any more.
            await image.detach()
            self.poke()
        return start, size, None if following is None else following[0] * cluster_size

    # Commands.

    def start(self, limit: int | None = None) -> None:
        """See `Job.start`. What the stream stopped for is no longer wrong with the image."""
        self.image.condition.clear(Cause.JOB_STOPPED)
        super().start(limit)

    def fail(self, error: QedfsError) -> None:
        """See `Job.fail`. Without its stream the image needs the source for good, so that the image tells of it."""
        self.image.condition.note(Cause.JOB_STOPPED, error)
        super().fail(error)

    # The work.

    async def work(self) -> bool:
        """Walk until nothing is missing any more; see `Job.work`."""
        image, fetch = self.image, self.image.fetch
        if fetch is None:
            return False
        self._known_failures = image.failures
        source_size = await image.source_size()
        image.streaming = True
        if image not in fetch.consumers:
            fetch.consumers.append(image)
        self._trying = self.hindered or image.full is not None
        image.try_again()
        kept, pause = image.counters.kept, PACE_SECONDS
        while await self._walk(source_size) and self.ignored is None:
            await fetch.landed(image)
            self._raise_failure()
            # What came and was not kept, for whatever reason, is not asked for again without a rest.
            lost = kept == image.counters.kept and not self._passed_over
            if lost or self._passed_over:
                await self.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS[1]) if lost else PACE_SECONDS
            kept = image.counters.kept
            if not self.allowed or self.hold_off():
                return False
        await fetch.landed(image)
        self._raise_failure()
        return await self._missing.next_run(0, source_size) is None

    async def finish(self) -> None:
        """Let the overlay forget its backing."""
        await self.image.detach()
        log.info("%s: complete, the backing is no longer needed", self.image.name)

    def stand_still(self) -> None:
        """What others fetch is of no use any more."""
        self.image.streaming = False

    async def remember_pause(self, *, paused: bool) -> None:
        """Write it into the overlay, so that the next mount finds the stream paused."""
        overlay = self.image.overlay
        if overlay.writable and overlay.record.paused != paused:
            await overlay.change_record(lambda record: dataclasses.replace(record, paused=paused))

    async def _walk(self, source_size: int) -> bool:
        """Walk over the map from the cursor to the end; returns whether another walk may find more to do."""
        image, fetch = self.image, self.image.fetch
        assert fetch is not None  # noqa: S101 - for the type checker; `work` has looked
        cluster_size = image.overlay.cluster_size
        asked = self._passed_over = False
        while self.allowed and (run := await self._missing.next_run(self.cursor, source_size)) is not None:
            if self.hold_off():
                return asked
            first, count = run[0], self._ours(run[0], self._paced(run[1]))
            if not count:
                self._passed_over, self.cursor = True, first + 1
                continue
            if due := self.rate_limiter.due():
                # In short sleeps, which a command ends: it may be a pause or another limit.
                await self.sleep(min(due, PACE_SECONDS))
                continue
            await fetch.turn(first, count, consumer=image)
            self._raise_failure()
            if not self.allowed or self.hold_off():
                return asked
            if not image.overlay.all_missing(first, count) or self._ours(first, count) < count:
                continue  # a reader, a guest or another image's stream has brought a part of it in, or is about to
            fetch.start(first, count, consumer=image)
            self.rate_limiter.sent(count * cluster_size)
            self.cursor, asked = first + count, True
            if self._trying:
                # One request shows whether the source is back, or the room; a window of them would be in vain.
                await fetch.landed(image)
                self._raise_failure()
                self._trying = False
                self.gets_on()
        self.cursor = 0
        return asked or self._passed_over

    def _paced(self, count: int) -> int:
        """How many of so many clusters one request may bring at this limit."""
        return int(max(1, min(count, self.rate_limiter.piece_bytes // self.image.overlay.cluster_size)))

    def _ours(self, first: int, count: int) -> int:
        """How many missing clusters from `first` on are for us to bring in.

        One that a guest's write has claimed is not: what we fetched would not be kept, and be fetched again until the
        write has ended. What is in flight may be claimed, and costs nothing.
        """
        overlay, fetch = self.image.overlay, self.image.fetch
        assert fetch is not None  # noqa: S101 - for the type checker; `work` has looked
        pending = (cluster for cluster in overlay.pending(first, count) if not fetch.in_flight(cluster))
        return next(pending, first + count) - first

    async def look_again(self) -> None:
        """Let the image be complete if readers and guests have brought in what a stream that failed could not."""
        image, fetch = self.image, self.image.fetch
        brought = image.counters.kept + image.counters.written
        if brought == self._looked_at or fetch is None or image.version is None:
            return
        self._looked_at = brought
        source_size = image.version.size
        try:
            pos = await self._missing.first_from(0)
            if pos is None or (source_size is not None and pos >= source_size):
                await fetch.landed(image)
                await image.detach()
                log.info("%s: complete all the same, by what readers have brought in", image.name)
        except QedfsError as exc:
            log.debug("%s: still failed: %s", image.name, exc)

    def _raise_failure(self) -> None:
        self._raise(*_LOSSES)
        if self.image.failures != self._known_failures:
            self._raise(*_FAILURES)

    def _raise(self, *causes: Cause) -> None:
        error = self.image.condition.first(*causes)
        if error is not None:
            raise error.fresh()
