"""The stream job: fetches the missing clusters of an image, then drops the overlay's backing.

Owns the order in which clusters are fetched, and when a request is sent. `job.py` has what all jobs have in common.
Must not know who controls it.

The stream walks the map from the start. A run of missing clusters becomes background requests, one for each turn that
the fetch queue grants. Holes in the source are handled on the way (`missing.py`). When nothing is missing any more and
all flights have landed, `finish` drops the backing, and the image is complete.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import ClassVar, Unpack

from qedfs.errors import QedfsError
from qedfs.fetch.queue import FetchQueue
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.jobs.job import RETRY_SECONDS, Job, JobOptions
from qedfs.jobs.missing import MissingRuns, fetch_of
from qedfs.jobs.state import State

log = logging.getLogger(__name__)

PACE_SECONDS = 0.25
# After these causes, nothing that is fetched can be stored until the overlay is opened again.
_LOSSES = (Cause.BARRIER_FAILED, Cause.SOURCE_CHANGED)
# After these causes, a retry may succeed.
_FAILURES = (Cause.NO_SPACE, Cause.FULL_AT_OPENING, Cause.COMMIT_FAILED, Cause.NOT_KEPT, Cause.FETCH_FAILED)


class StreamJob(Job):
    """The stream of one image. It exists as long as its image."""

    kind: ClassVar[str] = "stream"

    def __init__(self, image: Image, **options: Unpack[JobOptions]) -> None:
        """See `Job`. The stream starts paused if the overlay's record says so."""
        options["enabled"] = options.get("enabled", True) and image.overlay.writable
        super().__init__(
            image,
            **options,
            state=State.COMPLETE if image.complete else State.OFF,
            paused=image.overlay.record.paused,
        )
        # The image's own, because it also counts what other images fetch for this one.
        self.rate_limiter = image.limiter
        self.rate_limiter.limit = options.get("limit", 0)
        self._looked_at = -1  # the sum of the bytes adopted and written, as of the last `look_again`
        self._known_failures = 0  # `image.failures` when `work` last started; a different number means a new failure
        self._earlier: list[QedfsError | None] = []  # the image's errors at that time, for each of _FAILURES
        self._trying = False  # after a failure: send a single request first
        self._passed_over = False  # the last walk skipped clusters that writes have claimed
        self._missing = MissingRuns(image)

    # Progress.

    @property
    def done(self) -> bool:
        """Whether the image no longer needs its backing."""
        return self.image.complete

    @property
    def progress(self) -> int:
        """How many bytes the source is no longer needed for."""
        skipped = self._missing.skipped - self.image.discarded_holes  # those are populated
        return min(self.image.size, self.image.populated + skipped)

    @property
    def moved(self) -> int:
        """Without what guests have discarded: a trim is progress, but says nothing of the time for the rest."""
        overlay = self.image.overlay
        return self.image.populated + self._missing.skipped - overlay.discarded * overlay.cluster_size

    async def next_missing(self, pos: int) -> int | None:
        """The first byte at or after `pos` for which the source is still needed; None if there is none."""
        return await self._missing.first_from(pos)

    async def step(self, pos: int) -> tuple[int, int, int | None]:
        """Populate the next missing run at or after `pos` with one request.

        Returns (pos, size, next): the populated range, and where the next missing cluster is, or None. A size of 0
        means that nothing was missing. Raises the errors of the source and of the overlay.
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
            flights = await fetch.bring(first, count, consumer=image.consumer)
        await fetch.adopted(flights, consumer=image.consumer)
        self._raise(*_LOSSES, Cause.NO_SPACE)
        if image.overlay.all_missing(first, count) and not image.overlay.pending(first, count):
            self._raise(*_FAILURES)
            raise QedfsError(f"{image.name}: what was fetched could not be kept")
        following = await self._missing.next_run(first + count, source_size)
        if following is None and await self._missing.next_run(0, source_size) is None:
            # The client that controls the pace has reached the end: nothing needs the backing any more.
            await image.detach()
            self.poke()
        return start, size, None if following is None else following[0] * cluster_size

    # Commands.

    def start(self, limit: int | None = None) -> None:
        """See `Job.start`. Clears the trouble that had stopped the stream."""
        self.image.condition.clear(Cause.JOB_STOPPED)
        super().start(limit)

    def fail(self, error: QedfsError) -> None:
        """See `Job.fail`. Also notes the error in the image's condition, because the image keeps needing its source."""
        self.image.condition.note(Cause.JOB_STOPPED, error)
        super().fail(error)

    # The work.

    async def work(self) -> bool:
        """Walk until nothing is missing any more; see `Job.work`."""
        source = self.image.exchanges
        try:
            return await self._work()
        except QedfsError:
            if source == self.image.exchanges:
                raise
        return False  # the error is of a source that the image does not have any more

    async def _work(self) -> bool:
        image, fetch = self.image, self.image.fetch
        if fetch is None:
            return False
        self._known_failures, self._earlier = image.failures, [image.condition.noted(cause) for cause in _FAILURES]
        if image.overlay.missing == 0:
            return True  # guests have written or discarded the rest, so the source need not answer
        source_size = await image.source_size()
        image.streaming = True
        if image.consumer not in fetch.consumers:
            fetch.consumers.append(image.consumer)
        self._trying = self.hindered or image.full is not None
        image.consumer.try_again()
        kept, pause = image.counters.kept, PACE_SECONDS
        while await self._walk(source_size) and self.ignored is None:
            await fetch.landed(image.consumer)
            self._raise_failure()
            # If clusters arrived but were not adopted, for whatever reason, pause before requesting them again.
            lost = kept == image.counters.kept and not self._passed_over
            if lost or self._passed_over:
                await self.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS[1]) if lost else PACE_SECONDS
            kept = image.counters.kept
            if not self._goes_on(fetch):
                return False
        await fetch.landed(image.consumer)
        self._raise_failure()
        return await self._missing.next_run(0, source_size) is None

    async def finish(self) -> None:
        """Drop the overlay's backing."""
        await self.image.detach()
        log.info("%s: complete, the backing is no longer needed", self.image.name)

    def stand_still(self) -> None:
        """Stop adopting what other images fetch."""
        self.image.streaming = False

    async def remember_pause(self, *, paused: bool) -> None:
        """Store in the overlay's record whether the stream is paused, so that the next mount starts it likewise."""
        overlay = self.image.overlay
        if overlay.writable and overlay.record.paused != paused:
            await overlay.change_record(lambda record: dataclasses.replace(record, paused=paused))

    async def _walk(self, source_size: int) -> bool:
        """Walk over the map from the cursor to the end. Returns whether another walk may find more to do."""
        image, fetch = self.image, fetch_of(self.image)
        asked = self._passed_over = False
        while self.allowed and (run := await self._missing.next_run(self.cursor, source_size)) is not None:
            if self.hold_off():
                return asked
            first, count = run[0], self._ours(run[0], self._paced(run[1]))
            if not count:
                self._passed_over, self.cursor = True, first + 1
                continue
            if due := self._due():
                # Sleep for short periods; a command, such as a pause or a new limit, ends the sleep.
                await self.sleep(min(due, PACE_SECONDS))
                continue
            with self.until_poked() as wait:
                await fetch.turn(first, count, consumer=image.consumer)
            self._raise_failure()
            if not self._goes_on(fetch):
                return asked
            if wait.cancelled_caught or self._due():
                continue  # after a command, or because another image has fetched something for this one
            if not image.overlay.all_missing(first, count) or self._ours(first, count) < count:
                continue  # a reader, a guest or another image's stream has populated part of the run, or is about to
            fetch.start(first, count, consumer=image.consumer)
            self.cursor, asked = first + count, True
            if self._trying:
                # Wait for this single request, which shows whether the source is back, or whether there is space again.
                await fetch.landed(image.consumer)
                self._raise_failure()
                self._trying = False
                self.makes_progress()
        self.cursor = 0
        return asked or self._passed_over

    def _goes_on(self, fetch: FetchQueue) -> bool:
        """Whether a walk that uses this queue may continue."""
        return self.allowed and fetch is self.image.fetch and not self.hold_off()

    def _paced(self, count: int) -> int:
        """How many of `count` clusters one request may fetch at the current limit."""
        piece_bytes = fetch_of(self.image).piece_bytes(self.image.consumer)
        return int(max(1, min(count, piece_bytes // self.image.overlay.cluster_size)))

    def _due(self) -> float:
        """Seconds until the limit allows the next request. What it allows belongs to a profile first."""
        if self.image.replaying and fetch_of(self.image).piece_bytes(self.image.consumer) < math.inf:
            return PACE_SECONDS
        return self.rate_limiter.due()

    def _ours(self, first: int, count: int) -> int:
        """How many of the `count` clusters that start at `first` the stream should fetch.

        Stops at a cluster that a guest's write has claimed. Such a cluster would not be adopted, and so would be
        fetched again and again until the write has ended. A claimed cluster that is already in flight is no reason to
        stop, because it is not requested again.
        """
        overlay, fetch = self.image.overlay, fetch_of(self.image)
        pending = (cluster for cluster in overlay.pending(first, count) if not fetch.in_flight(cluster))
        return next(pending, first + count) - first

    async def look_again(self) -> None:
        """Complete the image if readers and guests have populated what the failed stream could not."""
        image, fetch = self.image, self.image.fetch
        brought, dropped = image.counters.kept + image.counters.written, image.overlay.dropping.count
        if brought == self._looked_at or fetch is None or image.version is None:
            return
        self._looked_at = brought
        source_size = image.version.size
        try:
            pos = await self._missing.first_from(0)
            if pos is None or (source_size is not None and pos >= source_size):
                await fetch.landed(image.consumer)
                if dropped != image.overlay.dropping.count:
                    return  # a commit needs the backing again
                await image.detach()
                log.info("%s: complete all the same, as readers and guests have populated the rest", image.name)
        except QedfsError as exc:
            log.debug("%s: still failed: %s", image.name, exc)

    def _raise_failure(self) -> None:
        self._raise(*_LOSSES)
        if self.image.failures != self._known_failures:
            # An earlier trouble may not be over yet: a full disk, until something is kept again. What has failed now
            # may be something else, such as the source, about which the policy decides differently.
            condition = self.image.condition
            condition.look()
            known = zip(_FAILURES, self._earlier, strict=True)
            self._raise(*(cause for cause, error in known if condition.noted(cause) is not error))

    def _raise(self, *causes: Cause) -> None:
        error = self.image.condition.first(*causes)
        if error is not None:
            raise error.fresh()
