"""One served image: an overlay, and the fetching of its missing clusters from the source.

Owns what a read, a write and a flush of the image do, and the exchange of its source and of its overlay. When it
commits is in `commit_schedule.py`, what it does with fetched bytes in `consumer.py`. Must not know FUSE or sockets.

Tasks. Any task on the event loop may read and write. The owner of the image calls `tend` every COMMIT_SECONDS, one
call at a time, to commit changes that have become old.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import trio

from qedfs.errors import NoSpace, QedfsError, SourceChanged, SourceUnreachable
from qedfs.fetch.queue import FetchQueue
from qedfs.fetch.rate_limiter import RateLimiter
from qedfs.format.tables import MISSING, ZERO
from qedfs.image.boot_profile import ReadTrace
from qedfs.image.commit_schedule import CommitSchedule
from qedfs.image.condition import Cause, Condition
from qedfs.image.consumer import ImageConsumer
from qedfs.image.counters import Counters
from qedfs.image.fetch_ahead import FetchAhead
from qedfs.image.missing_reads import MissingReads
from qedfs.image.own_backing import OwnBacking
from qedfs.image.pin import SourceVersion
from qedfs.image.rescue import Rescue
from qedfs.image.rmw_budget import RmwBudget, RmwReservation
from qedfs.image.source_errors import from_stored
from qedfs.image.stalls import Stalls
from qedfs.image.standby import PassThrough
from qedfs.image.write_gate import WriteGate
from qedfs.overlay.clustermap import Run
from qedfs.overlay.overlay import MAX_READ_BYTES, Overlay
from qedfs.overlay.ranges import Ranges
from qedfs.overlay.storage import Buffer
from qedfs.source.retrying import RetryingSource

log = logging.getLogger(__name__)


class Image:
    """One served image. Positions and sizes are in bytes of the image."""

    def __init__(
        self,
        name: str,
        overlay: Overlay,
        fetch: FetchQueue | None,
        *,
        copy_on_read: bool = True,
        standby: tuple[PassThrough, WriteGate] | None = None,
    ) -> None:
        """`fetch`: None for an overlay without backing, and in standby. `copy_on_read`: keep what readers ask for.

        `standby`: what it reads from, and the gate that holds or refuses writes, until it is activated.
        """
        self.name = name
        self.overlay = overlay
        self.fetch = fetch
        self.condition = Condition(overlay)
        self.version = SourceVersion(name, overlay, fetch, self.condition) if fetch is not None else None
        self.copy_on_read = copy_on_read and overlay.writable
        self.size = overlay.image_size
        self.counters = Counters()
        self.streaming = False  # set by the stream: this image wants everything that other images fetch
        self.limiter = RateLimiter()  # of what it gets in the background
        self.replaying = False  # a profile is being fetched, which comes before the stream
        self.failures = 0  # count of failed fetches, adoptions and commits, so that a retry notices a new failure
        self.source_holes = Ranges()  # L1 indices without a table where the source has a hole; set by the stream
        self.discarded_holes = 0  # bytes of them that were discarded since, and have an entry now
        self.waits = ReadTrace()  # what readers had to wait for, for a profile
        self._ahead = FetchAhead(self)
        self._rmw_budget = RmwBudget(overlay.cluster_size)
        self.commits = CommitSchedule(self)
        self.consumer = ImageConsumer(self)
        self.closed = False
        self.reads = MissingReads(self)
        self.stalls = Stalls(from_stored(overlay.record.on_source_error))  # the mount may replace it
        # In standby: what reads pass through to, and the gate. Without a gate, writes and adoptions are allowed.
        self.standby: PassThrough | None = None if standby is None else standby[0]
        self.gate: WriteGate | None = None if standby is None else standby[1]
        self.rescue: Rescue | None = None  # another copy of the source, which answers while the source does not
        self.own_backing: OwnBacking | None = None  # the way to a source of its own, if the mount has one
        self.committing_down = False  # while a job writes its clusters into its backing
        self.exchanges = 0  # how many times it has got another source

    @property
    def in_standby(self) -> bool:
        """Whether it takes no writes and keeps nothing of its source, because another program may still change that."""
        return self.gate is not None

    def open_gate(self) -> None:
        """End the standby: allow writes, also those that wait, and adoptions. The record must say so already."""
        if self.gate is not None:
            self.overlay.times.may_move = False  # so that the first write is noted in the record
            self.gate.open()
            self.gate = None

    @property
    def complete(self) -> bool:
        """Whether the overlay has no backing."""
        return self.overlay.backing is None

    @property
    def writable(self) -> bool:
        """Whether it can be written, and what is fetched can be kept."""
        return self.overlay.writable

    @property
    def journal_remark(self) -> str:
        """What the user should know about a killed session's writes that the image lacks; "" if there are none."""
        return self.overlay.journal_remark

    @property
    def source(self) -> RetryingSource | None:
        """Where its missing bytes come from; None if the overlay was opened without a backing. Images may share it."""
        if self.standby is not None:
            return self.standby.remote
        return None if self.fetch is None else self.fetch.remote

    @property
    def populated(self) -> int:
        """Bytes of the image that need no source; 0 until they have been counted."""
        missing = self.overlay.missing
        if self.complete:
            return self.size
        return 0 if missing is None else max(0, self.size - missing * self.overlay.cluster_size)

    @property
    def counted(self) -> bool:
        """Whether `populated` is valid, which it is once the missing clusters have been counted."""
        return self.complete or self.overlay.missing is not None

    # Read.

    async def read(self, pos: int, size: int) -> Buffer:
        """Up to `size` bytes at `pos`; fewer at the image's end.

        The result may be a view of a buffer that the next read overwrites, so pass it on before the next await.

        Raises:
            SourceError and its subclasses: missing bytes could not be fetched within the deadline.
            BadOverlay: a table entry is invalid.
        """
        if pos + size > self.size:
            size = max(0, self.size - pos)
        self.counters.read += size
        if self._ahead.active:
            self._ahead.fetch(pos, size)
        fast = self.overlay.read_now(pos, size)
        return fast if fast is not None else await self._read_runs(pos, size)

    async def _read_runs(self, pos: int, size: int) -> Buffer:
        if not size:
            return b""
        began = trio.current_time()
        while (found := await self._read_once(pos, size, began)) is None:
            pass
        return found

    async def _read_once(self, pos: int, size: int, began: float) -> Buffer | None:  # noqa: C901 - no await in between
        """The bytes; None if what they were made of is out of date, so that it must be looked up again."""
        runs = await self.overlay.map(pos, size)
        epoch, discards, exchanges = self.overlay.epoch, self.overlay.discards, self.exchanges
        if len(runs) == 1 and runs[0].offset > ZERO and size <= MAX_READ_BYTES:
            fast = self.overlay.read_data_now(runs[0].offset, size)
            if fast is not None:
                return fast
        buffer = bytearray(size)
        view = memoryview(buffer)
        missing = [(run.pos, view[run.pos - pos : run.pos - pos + run.size]) for run in runs if run.offset == MISSING]
        # A complete overlay has no entries for former holes of the source. Without a backing they read as zeros.
        if missing and self.source is not None and not self.complete:
            if not self._ahead.active:
                self._ahead.fetch(pos, size)
            # Before any wait for the disk. During such a wait the stream could fetch these clusters and adopt them, and
            # then they would cross the wire twice.
            if not await self.reads.fill(missing, began):
                return None
            if exchanges != self.exchanges:
                return None  # the overlay may have been emptied, and its file may be shorter
            if discards != self.overlay.discards:
                runs = await self.overlay.map(pos, size)
                if _lacks_more(missing, runs):
                    return None
                for run in runs:
                    if run.offset == ZERO:  # it may have been missing, and have been fetched
                        view[run.pos - pos : run.pos - pos + run.size] = bytes(run.size)
        with self.overlay.reading():
            for run in runs:
                if run.offset > ZERO:
                    await self.overlay.read_data(run.offset, view[run.pos - pos : run.pos - pos + run.size])
        return buffer if (epoch, exchanges) == (self.overlay.epoch, self.exchanges) else None

    @property
    def waiting_since(self) -> float | None:
        """When the oldest request began that waits for the source or the gate, by trio's clock; None if none does."""
        held = None if self.gate is None else self.gate.waiting.since
        return min((since for since in (self.reads.waiting.since, held) if since is not None), default=None)

    def give_up(self, *, since: float) -> None:
        """Fail the waiting requests that began at `since` or earlier. Bytes in flight are still adopted."""
        self.reads.waiting.give_up(since=since)
        if self.gate is not None:
            self.gate.waiting.give_up(since=since)

    def failed(self, error: QedfsError) -> None:
        """Record that a fetch has failed."""
        if isinstance(error, SourceChanged) and self.version is not None:
            self.version.refuse(error)
        self.note(Cause.FETCH_FAILED, error)

    def note(self, cause: Cause, error: QedfsError) -> None:
        """Record what is wrong, and that something has failed anew."""
        self.condition.note(cause, error)
        self.failures += 1

    # Write.

    def write_now(self, pos: int, data: memoryview) -> bool:
        """Write, if all of it is inside the image and need not wait. If it returns False, use `write`.

        Raises what `write` raises. Keeps no reference to `data`.
        """
        if pos + len(data) > self.size or not self.overlay.write_now(pos, data):
            return False
        self.counters.written += len(data)
        self.commits.soon()
        return True

    async def write(self, pos: int, data: Buffer) -> int:
        """Write the part of `data` that lies inside the image. Returns its size.

        Raises:
            NoSpace: the overlay cannot grow, or `pos` is at or past the image's end (as on a block device).
            ReadOnlyOverlay, SourceError: as `Overlay.write`.
        """
        inside = self.size - pos
        if inside < len(data):
            if inside <= 0:
                raise NoSpace(f"{self.name}: write past the end of the image")
            data = memoryview(data)[:inside]
        if not self.overlay.write_now(pos, data):  # always False in standby, as the times must not move then
            if self.gate is not None:
                await self.gate.passed()
            taken = RmwReservation(self._rmw_budget)
            try:
                await self.overlay.write(pos, data, functools.partial(self._fill, taken))
            finally:
                taken.give_back()
        self.counters.written += len(data)
        self.commits.soon()
        return len(data)

    async def _fill(self, taken: RmwReservation, cluster: int) -> Buffer:
        """The whole content of a missing cluster, for a write to a part of it. Raises the errors of the source.

        If too many such writes are running, it first waits for its turn, at most as long as a reader for the source.
        """
        assert self.fetch is not None  # noqa: S101 - for the type checker; without a backing no cluster is missing
        began = trio.current_time()
        if not taken.take_now():
            seconds = float("inf") if self.stalls.rule.wait else self.fetch.remote.deadline_seconds
            with self.reads.waiting.waiting(began) as wait, wait.attempt(min(seconds, self.stalls.most_seconds)):
                await taken.take()
            if not taken.take_now():
                raise SourceUnreachable(f"{self.name}: other writes wait for memory, and {wait.ended}")
        pos = cluster * self.overlay.cluster_size
        size = min(self.overlay.cluster_size, self.size - pos)
        buffer = bytearray(self.overlay.cluster_size)
        while not await self.reads.fill([(pos, memoryview(buffer)[:size])], began):
            if self.complete:
                return bytes(len(buffer))  # missing clusters of a complete image read as zeros
        return buffer

    async def flush(self) -> None:
        """Make every write that has returned durable. Raises what `Overlay.flush` raises."""
        await self.overlay.flush()

    def flush_now(self, done: Callable[[Exception | None], None]) -> bool:
        """Begin a flush if it is a short one. See `Committer.flush_now`."""
        return self.overlay.flush_now(done)

    @property
    def full(self) -> QedfsError | None:
        """The error if there was no space for what was fetched last."""
        return self.condition.noted(Cause.NO_SPACE)

    # The version of the source.

    @property
    def changed(self) -> QedfsError | None:
        """The error if the source serves another version than that of the overlay's clusters; otherwise None."""
        return None if self.version is None else self.version.changed

    async def source_size(self) -> int:
        """The size of the source, after the check of its version. Raises the errors of the source."""
        assert self.version is not None  # noqa: S101 - for the type checker; callers have checked
        source = self.exchanges
        try:
            return (await self.version.check()).size
        except QedfsError as exc:
            if source == self.exchanges:
                self.failed(exc)
            raise

    # Tend and close.

    @property
    def calm(self) -> bool:
        """Whether `tend` would find nothing to do. Takes less than a microsecond."""
        overlay = self.overlay
        if overlay.commit_pending or overlay.has_space_to_give_back or overlay.failure is not None or overlay.full:
            return False
        if overlay.missing is None and not overlay.writable:
            return False
        return not self._may_have_new_samples

    async def tend(self) -> None:
        """Commit what has not been committed, and do what else waits for a quiet moment. Call every COMMIT_SECONDS."""
        if self.overlay.missing is None and not self.overlay.writable:
            with contextlib.suppress(QedfsError):  # about a bad table, which the first count has reported
                await self.overlay.count_missing()  # again, because a failed barrier has taken entries back
        if self.overlay.writable and self.overlay.commit_pending and not self.commits.running:
            await self.commits.commit()
        await self.overlay.give_space_back()
        self.condition.look()
        await self._remember_version()

    async def detach(self) -> None:
        """Drop the backing, after the stream has found no missing cluster. See `Overlay.detach`."""
        await self.overlay.detach()
        self.stalls.wake()  # those that wait for the source read the overlay now
        self.streaming = False
        self._ahead.active = False
        if self.fetch is not None:
            self.fetch.part(self.consumer)

    def replace_overlay(self, overlay: Overlay) -> None:
        """Use the same file, opened anew after it was emptied."""
        self.overlay = overlay
        self.condition.follow(overlay)
        self.exchanges += 1  # a read must not use places in the file that it has looked up before

    def exchange_source(self, fetch: FetchQueue | None, *, standby: PassThrough | None = None) -> RetryingSource | None:
        """Give the image another source, in one step: `fetch`, or `standby`, in which nothing is kept.

        Returns the old source, which the caller closes. `fetch` must be a new queue with a new source, which the caller
        has connected and compared (`SourcePool.own_fetch_for`). A queue that is in use could have requests under way,
        and their bytes are older than this call. From here on:

        - A read that waits for the old source is run again on the new one, and gets no error from the old one.
        - Nothing that the old source brings is answered or adopted. An adoption that has begun to write goes on.
        - All that was known of the old source is forgotten: version, holes, extents, sequential readers, troubles.

        The caller deals with what is outside: the job (`StreamJob.poke`), and the pages that the kernel holds
        (`mount/kernel_pages.py`).
        """
        old = self.source
        self.exchanges += 1
        if self.fetch is not None:
            self.fetch.part(self.consumer)
        if self.version is not None:
            self.version.close()
        self.fetch, self.standby = fetch, standby
        self.version = None if fetch is None else SourceVersion(self.name, self.overlay, fetch, self.condition)
        self.streaming = False
        self.source_holes = Ranges()
        self.discarded_holes = 0
        self._ahead.forget()
        self.condition.clear(Cause.FETCH_FAILED)
        self.condition.clear(Cause.SOURCE_CHANGED)
        self.reads.waiting.run_again()
        return old

    @property
    def _may_have_new_samples(self) -> bool:
        return self.version is not None and bool(self.counters.kept or self.counters.written) and not self.complete

    async def _remember_version(self) -> None:
        """Store in the overlay what is known about the version of its new clusters, if there are any."""
        if self.version is None or not self._may_have_new_samples:
            return
        try:
            await self.version.remember()
        except Exception as exc:
            # The next session then knows less about the version. The cause also affects commits, which report it.
            log.debug("%s: samples are not stored: %s", self.name, exc)

    async def close(self) -> None:
        """Flush and close the overlay, but not the source, which the image does not own."""
        if not self.closed:
            self.closed = True
            if self.version is not None:
                self.version.close()
            if self.fetch is not None:
                self.fetch.part(self.consumer)
            await self.consumer.adoptions_ended()
            await self._remember_version()
            await self.overlay.close()


def _lacks_more(filled: list[tuple[int, memoryview]], runs: list[Run]) -> bool:
    """Whether something else is missing now than what was filled: clusters were dropped meanwhile."""
    ranges = [(pos, pos + len(view)) for pos, view in filled]
    lacking = (run for run in runs if run.offset == MISSING)
    return any(not any(pos <= run.pos and run.pos + run.size <= end for pos, end in ranges) for run in lacking)
