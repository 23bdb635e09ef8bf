"""THE object: one served image = an overlay, its source, and the fetching between them.

Owns what a read, a write and a flush of the image mean, which version of the source its clusters may come from (the
pin), and when entries are committed. Must not know FUSE, names or sockets.

Tasks: readers and writers call in from anywhere on the event loop; `run` is one background task per image that commits
by age. Fetched bytes come in through `take`, from the flight's task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence

import trio

from qedfs.errors import NoSpace, QedfsError, SourceChanged, SourceError, SourceUnreachable
from qedfs.fetch.queue import FetchQueue
from qedfs.format.tables import MISSING, ZERO
from qedfs.image.boot_profile import ReadTrace
from qedfs.image.condition import Cause, Condition
from qedfs.image.pin import SourceVersion
from qedfs.image.readahead import Readahead
from qedfs.image.rmw_budget import RmwBudget, RmwReservation
from qedfs.overlay.overlay import MAX_READ_BYTES, Overlay
from qedfs.overlay.storage import Buffer
from qedfs.source.retrying import RetryingSource

log = logging.getLogger(__name__)

COMMIT_BYTES = 64 << 20  # of new data before a commit; 16 barriers per GiB
# A power cut may take writes that nobody has flushed; this bounds how old they are (ext4's own commit interval is 5 s).
COMMIT_SECONDS = 2.0
MOST_UNCOMMITTED_BYTES = 256 << 20  # beyond, adoption waits for the disk
NO_SPACE_RETRY_SECONDS = 5.0
AHEAD_SECONDS = 5.0  # of the link's rate, that a sequential reader is served ahead at the most
MOST_AHEAD_BYTES = 48 << 20  # well below what may wait for one disk (`budget.py`)
AHEAD_UNKNOWN_BYTES = 2 << 20  # while the rate has not been measured


@dataclasses.dataclass(slots=True)
class Counters:
    """Bytes since the image was opened, for status and metrics."""

    read: int = 0
    written: int = 0
    missed: int = 0  # read by somebody from clusters that were missing
    kept_asked: int = 0  # adopted because a reader wanted them
    kept_stream: int = 0  # adopted in the background

    @property
    def kept(self) -> int:
        """Bytes that were adopted."""
        return self.kept_asked + self.kept_stream


class Image:
    """One served image. Positions and sizes in bytes of the image. It is its own `Consumer`."""

    def __init__(self, name: str, overlay: Overlay, fetch: FetchQueue | None, *, copy_on_read: bool = True) -> None:
        """`fetch`: None for an overlay without backing. `copy_on_read`: keep what readers make us fetch."""
        self.name = name
        self.overlay = overlay
        self.fetch = fetch
        self.condition = Condition(overlay)
        self.version = SourceVersion(name, overlay, fetch, self.condition) if fetch is not None else None
        self.copy_on_read = copy_on_read and overlay.writable
        self.size = overlay.image_size
        self.counters = Counters()
        self.streaming = False  # set by the stream: this image wants whatever others fetch
        self.failures = 0  # to fetch, keep or commit: whoever retries tells a new one from the one that it knows
        self._full_at = float("-inf")  # when the overlay could not grow, unless it has since
        self.waits = ReadTrace()  # of readers, for a profile
        self._readahead = Readahead()
        self._rmw_budget = RmwBudget(overlay.cluster_size)
        self._committing = False
        self._commit_told = ""  # what the log has of a commit that failed
        self._closed = False
        self._reads: dict[trio.CancelScope, float] = {}  # that wait for the source, and since when
        self._takes = 0  # adoptions under way
        self._untouched = trio.Event()  # set when the last of them has ended

    @property
    def complete(self) -> bool:
        """Whether the overlay stands alone."""
        return self.overlay.backing is None

    @property
    def writable(self) -> bool:
        """Whether it can be written, and what is fetched can be kept."""
        return self.overlay.writable

    @property
    def source(self) -> RetryingSource | None:
        """Where its missing bytes come from; None for an overlay that never had a backing. Images share it."""
        return None if self.fetch is None else self.fetch.remote

    @property
    def populated(self) -> int:
        """Bytes of the image that need no source, 0 until they have been counted."""
        missing = self.overlay.missing
        if self.complete:
            return self.size
        return 0 if missing is None else max(0, self.size - missing * self.overlay.cluster_size)

    @property
    def counted(self) -> bool:
        """Whether `populated` tells: not before the missing clusters have been counted once."""
        return self.complete or self.overlay.missing is not None

    # Read.

    async def read(self, pos: int, size: int) -> Buffer:
        """Up to `size` bytes at `pos`; fewer at the image's end.

        The result may be a view of a buffer that the next read overwrites: hand it on before the next await.

        Raises:
            SourceError and its children: bytes that only the source has did not come within the deadline.
            BadOverlay: an entry on the way cannot be.
        """
        if pos + size > self.size:
            size = max(0, self.size - pos)
        self.counters.read += size
        if self._readahead.active:
            self._fetch_ahead(pos, size)
        fast = self.overlay.read_now(pos, size)
        return fast if fast is not None else await self._read_runs(pos, size)

    async def _read_runs(self, pos: int, size: int) -> Buffer:
        if not size:
            return b""
        runs = await self.overlay.map(pos, size)
        epoch = self.overlay.epoch
        if len(runs) == 1 and runs[0].offset > ZERO and size <= MAX_READ_BYTES:
            fast = self.overlay.read_data_now(runs[0].offset, size)
            if fast is not None:
                return fast
        buffer = bytearray(size)
        view = memoryview(buffer)
        missing = [(run.pos, view[run.pos - pos : run.pos - pos + run.size]) for run in runs if run.offset == MISSING]
        # A complete overlay has no entry for what was a hole of the source: that reads as zeros, as without a backing.
        if missing and self.fetch is not None and not self.complete:
            if not self._readahead.active:
                self._fetch_ahead(pos, size)
            # Before anything that waits for the disk: while we waited, the stream would bring these clusters in, and
            # they would cross the wire again.
            if not await self._read_missing(missing):
                return await self._read_runs(pos, size)
        for run in runs:
            if run.offset > ZERO:
                await self.overlay.read_data(run.offset, view[run.pos - pos : run.pos - pos + run.size])
        return buffer if epoch == self.overlay.epoch else await self._read_runs(pos, size)

    async def _read_missing(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """Fill each view with the image's bytes at its position, which only the source has; zeros behind its end.

        False: the source has failed, and is needed no longer. The stream has come to its end meanwhile, and whoever
        waited for that may have deleted it: the overlay has the bytes now, or they are zeros.
        """
        assert self.fetch is not None  # noqa: S101 - for the type checker; callers have looked
        assert self.version is not None  # noqa: S101 - as above
        if (changed := self.version.changed) is not None:
            raise changed.fresh()
        if self.version.identity is not None and pieces[0][0] >= self.version.identity.size:
            return True  # there is nothing to wait for
        with self._reading() as scope:
            try:
                async with self.fetch.waiting():
                    source_size = (await self.version.check()).size
                    inside = [(pos, view) for pos, view in pieces if pos < source_size]
                    for pos, view in inside:
                        self.counters.missed += len(view)
                        self.waits.note(pos, len(view))
                    if inside:
                        await self.fetch.read(inside, consumer=self if self.copy_on_read else None)
                        await self.version.check()
            except QedfsError as exc:
                if self.complete:
                    return False
                self._failed(exc)
                raise
        if scope.cancelled_caught:
            raise SourceUnreachable(f"{self.name}: nobody waits for this read any more")
        self.condition.clear(Cause.FETCH_FAILED)
        return True

    @contextlib.contextmanager
    def _reading(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            self._reads[scope] = trio.current_time()
            try:
                yield scope
            finally:
                del self._reads[scope]

    @property
    def waiting_since(self) -> float | None:
        """When the oldest read came that waits for the source, by trio's clock."""
        return next(iter(self._reads.values()), None)

    def give_up(self, *, since: float) -> None:
        """End the reads that have waited for the source since then, with an error. What is on the way is kept."""
        for scope, began in self._reads.items():
            if began <= since:
                scope.cancel()

    def _failed(self, error: QedfsError) -> None:
        """Nothing came from the source, whatever the reason."""
        if isinstance(error, SourceChanged) and self.version is not None:
            self.version.refuse(error)
        self._note(Cause.FETCH_FAILED, error)

    def _note(self, cause: Cause, error: QedfsError) -> None:
        self.condition.note(cause, error)
        self.failures += 1

    def _fetch_ahead(self, pos: int, size: int) -> None:
        """Go ahead of a sequential reader: by some windows, since a part of that has arrived and waits to be read."""
        identity = self.version.identity if self.version is not None else None
        if not self.copy_on_read or self.fetch is None or identity is None:
            return
        window = self.fetch.window
        # On a slow link, what is ahead of the reader is also in its way: at most some seconds of it.
        most = int(min(3 * window.bytes, AHEAD_SECONDS * window.rate)) if window.rate else AHEAD_UNKNOWN_BYTES
        most = min(most, MOST_AHEAD_BYTES)
        advice = self._readahead.advise(pos, size, most=most, step=window.request_bytes)
        if advice is None:
            return
        start, length = advice[0], min(advice[1], min(self.size, identity.size) - advice[0])
        if length <= 0:
            return
        if self.overlay.is_loaded(start, length):
            self._start_ahead(start, length)
        else:
            self.fetch.nursery.start_soon(self._load_and_start_ahead, start, length)

    async def _load_and_start_ahead(self, pos: int, size: int) -> None:
        try:
            await self.overlay.map(pos, size)
            self._start_ahead(pos, size)
        except QedfsError as exc:
            # Nobody waits for these bytes; a reader who comes here meets the same error and tells it.
            log.debug("%s: no read-ahead at %d: %s", self.name, pos, exc)
        except Exception:
            # This task is nobody's child: a fault of ours here would end every image of the mount.
            log.exception("%s: no read-ahead at %d", self.name, pos)

    def _start_ahead(self, pos: int, size: int) -> None:
        # The stream may have come to its end while the map was loaded, and the source may be gone with it.
        if self.fetch is None or self._closed or self.complete:
            return
        for run in self.overlay.map_now(pos, size) or ():
            if run.offset == MISSING:
                first = run.pos // self.overlay.cluster_size
                count = (run.pos + run.size - 1) // self.overlay.cluster_size - first + 1
                started = self.fetch.ahead(first, count, consumer=self)
                if started < count:
                    self._readahead.fell_short((first + started) * self.overlay.cluster_size, pos + size)
                    return

    # Write.

    async def write(self, pos: int, data: Buffer) -> int:
        """Write what lies inside the image; returns how many bytes that were.

        Raises:
            NoSpace: the overlay cannot grow, or `pos` is at or behind the image's end (as on a block device).
            ReadOnlyOverlay, SourceError: as `Overlay.write`.
        """
        inside = self.size - pos
        if inside < len(data):
            if inside <= 0:
                raise NoSpace(f"{self.name}: write behind the end of the image")
            data = memoryview(data)[:inside]
        if not self.overlay.write_now(pos, data):
            taken = RmwReservation(self._rmw_budget)
            try:
                await self.overlay.write(pos, data, functools.partial(self._fill, taken))
            finally:
                taken.give_back()
        self.counters.written += len(data)
        self._commit_soon()
        return len(data)

    async def _fill(self, taken: RmwReservation, cluster: int) -> Buffer:
        """The whole content of a missing cluster, for a write that covers it in part. Errors of the source.

        With many such writes at once, a deadline at the most goes by until there is room for another one.
        """
        assert self.fetch is not None  # noqa: S101 - for the type checker; without a backing no cluster is missing
        if not taken.take_now():
            seconds = self.fetch.remote.deadline_seconds
            with trio.move_on_after(seconds) as scope:
                await taken.take()
            if scope.cancelled_caught:
                raise SourceUnreachable(f"{self.name}: other writes have waited for the backing for {seconds:g} s")
        pos = cluster * self.overlay.cluster_size
        size = min(self.overlay.cluster_size, self.size - pos)
        buffer = bytearray(self.overlay.cluster_size)
        if not await self._read_missing([(pos, memoryview(buffer)[:size])]):
            return bytes(len(buffer))  # what is missing of a complete image is zeros
        return buffer

    async def flush(self) -> None:
        """Make every write that has returned survive a power cut. Errors as `Overlay.flush`."""
        await self.overlay.flush()

    # Adopt: this image as a taker.

    def wants(self, pos: int, size: int) -> bool:
        """Whether bytes that another image made us fetch are of use here: it streams, from this same version."""
        known = self.version is not None and self.version.identity is not None
        return self.streaming and known and pos < self.size

    async def take(self, pos: int, buffer: bytearray, size: int, *, asked: bool) -> None:
        """Adopt fetched bytes; see `Overlay.adopt`. A full disk is remembered, not raised: the reader has its bytes."""
        if self.changed is not None or self._closed or pos >= self.size or self._too_full():
            return
        self._takes += 1
        try:
            await self._keep(pos, buffer, min(size, self.size - pos), asked=asked)
        finally:
            self._takes -= 1
            if not self._takes:
                self._untouched.set()

    async def _keep(self, pos: int, buffer: bytearray, size: int, *, asked: bool) -> None:
        try:
            if self.version is not None:
                await self.version.check()  # once more: the answer may have told more of it
            self.condition.clear(Cause.FETCH_FAILED)
            kept = await self.overlay.adopt(pos, buffer, size, cold=not asked)
        except NoSpace as exc:
            self._full_at = trio.current_time()
            self._note(Cause.NO_SPACE, exc)
            return
        except SourceError as exc:
            self._failed(exc)
            return
        except Exception as exc:
            if not isinstance(exc, QedfsError):
                # A fault of ours; the stream must know of it, or it would ask for these clusters again at once.
                log.exception("%s: cannot keep what was fetched", self.name)
                exc = QedfsError("internal error, see the log")
            self._note(Cause.NOT_KEPT, exc)
            return
        if kept:  # what a guest's write had claimed says nothing of the disk
            self._full_at = float("-inf")
            self.condition.clear(Cause.NO_SPACE)
            self.condition.clear(Cause.NOT_KEPT)
        if asked:
            self.counters.kept_asked += kept
        else:
            self.counters.kept_stream += kept
        if self.overlay.uncommitted_bytes >= MOST_UNCOMMITTED_BYTES or self.overlay.crowded:
            await self._commit()
        else:
            self._commit_soon()

    def lost(self, error: QedfsError) -> None:
        """A flight that should have brought clusters here has failed."""
        if not self.complete:
            self._failed(error)

    def _too_full(self) -> bool:
        return trio.current_time() - self._full_at < NO_SPACE_RETRY_SECONDS

    @property
    def full(self) -> QedfsError | None:
        """What was fetched last found no room in the overlay."""
        return self.condition.noted(Cause.NO_SPACE)

    def try_again(self) -> None:
        """Let the next fetched bytes find out whether there is room by now."""
        self._full_at = float("-inf")

    # The version of the source.

    @property
    def changed(self) -> QedfsError | None:
        """Says so if the source is another version than the overlay's clusters."""
        return None if self.version is None else self.version.changed

    async def source_size(self) -> int:
        """Bytes of the source, once it is known to be the right version. Errors of the source."""
        assert self.version is not None  # noqa: S101 - for the type checker; callers have looked
        try:
            return (await self.version.check()).size
        except QedfsError as exc:
            self._failed(exc)
            raise

    # Commit and close.

    def _commit_soon(self) -> None:
        if self.overlay.uncommitted_bytes >= COMMIT_BYTES and not self._committing and self.fetch is not None:
            self.fetch.nursery.start_soon(self._commit)
            self._committing = True

    async def _commit(self) -> None:
        self._committing = True
        try:
            await self.overlay.commit()
        except NoSpace:
            self._full_at = trio.current_time()
            self.failures += 1
        except Exception as exc:
            if not isinstance(exc, QedfsError):
                # A fault of ours must cost this image only, not every image of the mount.
                log.exception("%s: cannot commit", self.name)
                exc = QedfsError("internal error, see the log")
            if self._commit_told != str(exc):
                log.error("%s: %s", self.name, exc)
                self._commit_told = str(exc)
            self.failures += 1
        else:
            self._commit_told = ""
        finally:
            self._committing = False

    async def run(self) -> None:
        """Commit what has become old; runs until cancelled."""
        while not self._closed:
            await trio.sleep(COMMIT_SECONDS)
            if self.overlay.missing is None and not self.overlay.writable:
                with contextlib.suppress(QedfsError):  # of a bad table, which the first count has told
                    await self.overlay.count_missing()  # again, since a failed barrier has taken entries back
            if self.overlay.writable and self.overlay.commit_pending and not self._committing:
                await self._commit()
            self.condition.look()
            await self._remember_version()

    async def detach(self) -> None:
        """Drop the backing: the stream has seen that nothing of it is missing. See `Overlay.detach`."""
        await self.overlay.detach()
        self.streaming = False
        self._readahead.active = False
        if self.fetch is not None and self in self.fetch.consumers:
            self.fetch.consumers.remove(self)

    async def _remember_version(self) -> None:
        """Let the overlay know more of the version that its clusters are of, once it holds some."""
        if self.version is None or not (self.counters.kept or self.counters.written) or self.complete:
            return
        try:
            await self.version.remember()
        except Exception as exc:
            # Without it the next session knows less; whatever hinders it hinders the commits too, which tell.
            log.debug("%s: samples are not stored: %s", self.name, exc)

    async def close(self) -> None:
        """Flush and close the overlay; the source is its owner's matter."""
        if not self._closed:
            self._closed = True
            if self.version is not None:
                self.version.close()
            if self.fetch is not None and self in self.fetch.consumers:
                self.fetch.consumers.remove(self)
            if self._takes:
                # A thread may be writing into the overlay: closed now, its clusters would be lost and their place leak.
                self._untouched = trio.Event()
                await self._untouched.wait()
            await self._remember_version()
            await self.overlay.close()
