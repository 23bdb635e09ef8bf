"""The queue of one source: who fetches what, once, and in which order.

Owns the flights (requests under way). When one of the background may start is decided in `scheduler.py`. Must not know
overlays: whoever wants to keep bytes is a `Consumer`.

Concurrency protocol
--------------------
- A *flight* carries neighbouring clusters from the source. `_flights` maps each cluster to the flight that carries it,
  from the moment it is asked for until it has *landed*: every taker has adopted it. Whoever wants a cluster that is in
  flight joins the flight, so a cluster crosses the wire once however many readers and overlays want it.
- Bytes are there from `arrived` on; readers copy what they need without waiting for the adoption.
- Each taker adopts in a task of its own. One whose disk hangs holds up no requests but its own, and is offered nothing
  more when half of what may be held waits for it (`budget.py`).
- A flight is a task of the nursery, not of the reader who asked first: a reader that is killed ends nobody's flight.
- Look-up and registration of flights happen without an await in between.
- A flight's buffer goes back to the free ones when it has no readers and no takers left (`Flight.holders`).
- A flight of the background may live for minutes, on a slow link or because its answer got lost. A reader that finds it
  late (`_late_at`) asks for its own bytes beside it, urgently; the first answer wins, and only the flight is kept.

Order: a reader's request leaves at once. The others wait for their turn.

Memory: the flights of a queue hold at most MOST_HELD_BYTES, whatever clusters an overlay has, and less where those of
other queues need the room (`memory_pool.py`); `bring`, which a user asks for, may add a request. A reader that finds no
room for a flight, or whose clusters are larger than LARGE_CLUSTER_BYTES, gets only the bytes that it asked for,
straight into its own buffer, and nothing is kept; there is a bound for all such readers. Beside that there are free
buffers (`buffer_pool.py`) and, for each image, the rest of clusters written in part (`rmw_budget.py`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence

import trio

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.fetch.budget import Budget
from qedfs.fetch.buffer_pool import BufferPool
from qedfs.fetch.congestion import CongestionWindow
from qedfs.fetch.flight import Consumer, Flight
from qedfs.fetch.latency import Histogram
from qedfs.fetch.scheduler import Scheduler
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share
from qedfs.source.base import Extent, Identity
from qedfs.source.retrying import RetryingSource
from qedfs.source.zeros import clear

log = logging.getLogger(__name__)

Part = tuple[int, memoryview, Flight | None]  # position, bytes of a reader's request, and who carries them

LATE_DEADLINES = 1 / 3  # that a reader waits at the most for a flight of the background
# A reader does not wait until a larger one has come; such clusters are for the background to bring in.
LARGE_CLUSTER_BYTES = 4 << 20


class FetchQueue:
    """All fetching from one source in units of one cluster size."""

    def __init__(
        self, remote: RetryingSource, cluster_size: int, nursery: trio.Nursery, *, buffers: BufferPool | None = None
    ) -> None:
        """`buffers`: shared with the queues of other sources, so that their number does not count."""
        self.remote = remote
        self.cluster_size = cluster_size
        self.window = CongestionWindow()
        self.consumers: list[Consumer] = []  # who may want what others fetch
        self.fetched_bytes = 0
        self.waits = Histogram()  # of readers, from the question to the last byte or the error
        self.nursery = nursery
        self._flights: dict[int, Flight] = {}
        self._buffers = buffers or BufferPool()
        self._large = cluster_size > LARGE_CLUSTER_BYTES
        self._budget = Budget()
        self._alone = Share(memory_pool.ALONE)
        self._scheduler = Scheduler(self.window, self._budget)

    @property
    def readers(self) -> int:
        """How many wait for bytes, or for the first connection."""
        return self._scheduler.readers

    @property
    def held_bytes(self) -> int:
        """Of all flights: on the way, or here and not adopted yet."""
        return self._budget.held

    @property
    def background_bytes(self) -> int:
        """On the way, and nobody waited for them when they left."""
        return self._budget.background

    def background_request_bytes(self) -> int:
        """A good size for the next background request, another one each time."""
        return self._scheduler.request_bytes()

    async def identity(self) -> Identity:
        """The version that the source serves; connects if need be. Errors of the source."""
        return self.remote.identity or await self.remote.connect()

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts of the source read as zeros. Errors of the source."""
        return await self.remote.extents(pos, size)

    # For readers.

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Around all that a reader waits for: the first connection and the look at the version too.

        As long as it lasts, and for a moment after, the background holds back. It ends with the deadline, whatever it
        is that still waits: each of the steps may have one of its own, and a flight of the background has more time. It
        ends sooner if the source is dead (`RetryingSource.reader`).

        Raises:
            SourceUnreachable: it has ended so.
        """
        started = trio.current_time()
        try:
            with self._scheduler.reading():
                async with self.remote.reader():
                    yield
        finally:
            self.waits.note(trio.current_time() - started)

    async def read(self, pieces: Sequence[tuple[int, memoryview]], *, consumer: Consumer | None) -> None:
        """Fill each view with the image's bytes at its position; called inside `waiting`. Errors of the source."""
        source_size = (await self.identity()).size
        if consumer is None:  # nobody would keep them
            pieces = [piece for piece in pieces if not self._fill_known_zeros(*piece)]
        # All of them before the first wait: what lands meanwhile would be taken for missing and fetched again.
        parts = [part for pos, view in pieces for part in self._parts(pos, view, source_size, consumer)]
        try:
            for pos, view, flight in parts:
                if flight is None:
                    await self._read_alone(pos, view, source_size)
                else:
                    await self._copy(flight, pos, view, source_size)
        finally:
            for _, _, flight in parts:
                if flight is not None:
                    self._release(flight)

    def _fill_known_zeros(self, pos: int, view: memoryview) -> bool:
        """Answer from what the source knows of its holes; a flight of zeros costs five times as much."""
        if not self.remote.zeros_now(pos, len(view)):
            return False
        clear(view)
        return True

    def _parts(self, pos: int, view: memoryview, source_size: int, consumer: Consumer | None) -> Iterator[Part]:
        """Cut a piece at the borders of flights, which are held; None in place of one where there is no room for it."""
        first, end = pos // self.cluster_size, pos + len(view)
        count = -(-end // self.cluster_size) - first
        for stop, flight in self._join(first, count, source_size, consumer, asked=True, urgent=True):
            size = min(stop * self.cluster_size, end) - pos
            yield pos, view[:size], flight
            pos, view = pos + size, view[size:]

    async def _copy(self, flight: Flight, pos: int, view: memoryview, source_size: int) -> None:
        """As `Flight.copy_to`; the bytes are fetched beside the flight if it belongs to the background and is late."""
        if not (flight.urgent or await flight.arrives(self._late_at(flight))):
            flight.overdue = True
            with trio.CancelScope() as race:
                flight.rivals.append(race)
                await self._read_alone(pos, view, source_size)
                return
        await flight.copy_to(pos, view)

    def _late_at(self, flight: Flight) -> float:
        """When a reader that comes now gives a flight of the background up."""
        now = trio.current_time()
        if flight.overdue:
            return now
        late = flight.since + self.window.late_after(flight.size, flight.behind)
        return min(late, now + LATE_DEADLINES * self.remote.deadline_seconds)

    async def _read_alone(self, pos: int, view: memoryview, source_size: int) -> None:
        """Fetch bytes for one reader, and nobody else."""
        wanted = max(0, min(len(view), source_size - pos))
        if wanted:
            # A reader's buffer takes no memory before there are bytes in it: a server that sends half of each answer
            # could fill those of all readers.
            while not self._alone.fits(wanted):
                await self._alone.change()
            self._alone.take(wanted)
            if self.remote.is_dead:
                self.nursery.start_soon(self._ask, pos)
            try:
                await self.remote.read(pos, view[:wanted], urgent=True)
            finally:
                self._alone.give(wanted)
        view[wanted:] = bytes(len(view) - wanted)
        self.fetched_bytes += wanted

    async def _ask(self, pos: int) -> None:
        """Ask a dead source for a byte. It goes on when the reader has got its error, as a flight would.

        Otherwise a source that is back, but needs longer than such a reader waits, would stay dead for good.
        """
        try:
            await self.remote.read(pos, memoryview(bytearray(1)), urgent=True)
        except QedfsError as exc:
            log.debug("asked a dead source: %s", exc)
        except Exception:
            log.exception("cannot ask a dead source")  # nobody's child: it must cost no other image

    # For the background: read-ahead and stream.

    def ahead(self, first: int, count: int, *, consumer: Consumer) -> int:
        """Start fetching clusters that a sequential reader will want soon, without waiting for them.

        Returns how many of them: there may not be room for all.
        """
        step = max(1, self.window.request_bytes // self.cluster_size)
        for at in range(first, first + count, step):
            if not self._has_room(step) or self._budget.is_behind(consumer, step * self.cluster_size):
                return at - first
            self.start(at, min(step, first + count - at), consumer=consumer, asked=True)
        return count

    async def turn(self, first: int, count: int, *, consumer: Consumer, preferred: bool = False) -> None:
        """Wait until a background request for these clusters may leave. `preferred`: a reader will soon want them.

        Joining what is in flight already needs no turn. Others may have brought the clusters in meanwhile: the caller
        looks again, and calls `start` with no await in between.
        """
        await self.identity()
        if any(cluster not in self._flights for cluster in range(first, first + count)):
            await self._scheduler.turn(consumer, count * self.cluster_size, preferred=preferred)

    def start(self, first: int, count: int, *, consumer: Consumer, asked: bool = False) -> None:
        """Fetch clusters that nobody waits for yet; the source has been reached before (`identity`)."""
        self._send(first, count, consumer, asked=asked, urgent=False)

    async def bring(self, first: int, count: int, *, consumer: Consumer) -> list[Flight]:
        """Fetch clusters for a taker who waits for them; called inside `waiting`. Errors of the source.

        Returns when the bytes are here; `adopted` tells when the taker has had them.
        """
        await self.identity()
        flights = self._send(first, count, consumer, asked=True, urgent=True)
        for flight in flights:
            await flight.arrived.wait()
            if flight.error is not None:
                raise flight.error.fresh()
        return flights

    async def adopted(self, flights: Sequence[Flight], *, consumer: Consumer) -> None:
        """Wait until this taker has had the bytes of these flights."""
        while any(consumer in flight.consumers for flight in flights):
            await self._scheduler.change()

    def flights(self) -> list[Flight]:
        """The requests under way, the oldest first."""
        return sorted(set(self._flights.values()), key=lambda flight: flight.since)

    def in_flight(self, cluster: int) -> bool:
        """Whether a flight carries this cluster."""
        return cluster in self._flights

    async def landed(self, consumer: Consumer) -> None:
        """Wait until no flight has this taker."""
        while self._budget.held_for(consumer):
            await self._scheduler.change()

    # Flights.

    def _join(
        self,
        first: int,
        count: int,
        source_size: int,
        consumer: Consumer | None,
        *,
        asked: bool,
        urgent: bool,
        needed: bool = False,
    ) -> list[tuple[int, Flight | None]]:
        """The flights that carry these clusters, in order, and where each ends; those not under way are started.

        Each of them is held; give it back with `_release`. None: there is no room for one, and none is `needed`.
        """
        found: list[tuple[int, Flight | None]] = []
        cluster, end = first, first + count
        while cluster < end:
            flight, stop = self._flights.get(cluster), cluster + 1
            if flight is None:
                while stop < end and stop not in self._flights:
                    stop += 1
                if needed or self._has_room(stop - cluster):
                    flight = self._start(cluster, stop - cluster, source_size, consumer, urgent=urgent)
            elif self._large and not needed and not flight.arrived.is_set():
                flight = None  # it will take too long
            if flight is not None:
                if consumer is not None:
                    self._offer(flight, consumer)
                flight.asked |= asked
                flight.holders += 1
                stop = flight.first + flight.size // self.cluster_size
            found.append((stop, flight))
            cluster = stop
        return found

    def _send(self, first: int, count: int, consumer: Consumer, *, asked: bool, urgent: bool) -> list[Flight]:
        """Have flights under way that bring these clusters to a taker."""
        identity = self.remote.identity
        if identity is None:
            return []
        found = self._join(first, count, identity.size, consumer, asked=asked, urgent=urgent, needed=True)
        flights = [flight for _, flight in found if flight is not None]
        for flight in flights:
            self._release(flight)
        return flights

    def _has_room(self, count: int) -> bool:
        """Whether so many clusters may be fetched that a reader wants, or will want."""
        return not self._large and self._budget.has_room(count * self.cluster_size)

    def _offer(self, flight: Flight, consumer: Consumer) -> None:
        """Let somebody have the flight's bytes as soon as they are here."""
        if consumer in flight.consumers or self._budget.is_behind(consumer, flight.size):
            return
        if flight.arrived.is_set():
            self.nursery.start_soon(self._hand_over, flight, consumer)
        self._budget.join(flight, consumer)

    def _start(self, first: int, count: int, source_size: int, consumer: Consumer | None, *, urgent: bool) -> Flight:
        pos = first * self.cluster_size
        size = count * self.cluster_size  # whole: images of other sizes share the flight
        now = trio.current_time()
        flight = Flight(first, pos, size, self._buffers.take(count * self.cluster_size), since=now, urgent=urgent)
        # Before it is registered: a flight without a task would be waited for in vain. It runs at the next await.
        self.nursery.start_soon(self._fly, flight, max(0, min(size, source_size - pos)))
        # Counted here and not by the flight's task, which runs later: whoever asks for its turn next must see it.
        flight.behind = self._budget.in_flight(consumer)
        self.window.started(now, flight.behind, self.remote.received)
        self._budget.start(flight)
        for cluster in range(first, first + count):
            self._flights[cluster] = flight
        return flight

    async def _fly(self, flight: Flight, wanted: int) -> None:
        """One request, and what becomes of it. `wanted` bytes are inside the source, the rest is zeros."""
        # Stays so if this task is cancelled: readers who are not would take the zeros of the buffer for the bytes.
        flight.error = SourceUnreachable(f"backing {self.remote.location}: closed")
        try:
            await self._bring(flight, wanted)
            flight.error = None
            for consumer in self.consumers:
                if consumer.wants(flight.pos, flight.size):
                    self._offer(flight, consumer)
        except QedfsError as exc:
            flight.error = exc
        except Exception:
            flight.error = _fault(flight)
        finally:
            consumers = self._arrived(flight)
        for consumer in consumers[1:]:
            self.nursery.start_soon(self._hand_over, flight, consumer)
        if consumers:
            await self._hand_over(flight, consumers[0])

    async def _bring(self, flight: Flight, wanted: int) -> None:
        started = trio.current_time()
        view = memoryview(flight.buffer)
        if wanted:
            await self.remote.read(flight.pos, view[:wanted], urgent=flight.urgent, patient=not flight.urgent)
        view[wanted:] = bytes(len(view) - wanted)
        if not wanted:
            return  # behind the source's end: that says nothing of the link
        self.fetched_bytes += wanted
        now = trio.current_time()
        self.window.arrived(now, wanted, now - started, self.remote.received, flight.behind)

    def _arrived(self, flight: Flight) -> list[Consumer]:
        """Tell all who wait; returns those who have something to take."""
        flight.arrive()
        self._budget.arrive(flight)
        if flight.error is not None:
            # They have to know: without a word they would ask again at once.
            for consumer in list(flight.consumers):
                consumer.lost(flight.error)
                self._budget.leave(flight, consumer)
        if flight.consumers:
            self._scheduler.wake()
        else:
            self._land(flight)
        return list(flight.consumers)

    async def _hand_over(self, flight: Flight, consumer: Consumer) -> None:
        try:
            await consumer.take(flight.pos, flight.buffer, flight.size, asked=flight.asked)
        except Exception:
            # It has its own ways to tell of its failures: this is a fault of ours, and costs this flight only.
            consumer.lost(_fault(flight))
        finally:
            self._budget.leave(flight, consumer)
            if flight.consumers:
                self._scheduler.wake()
            else:
                self._land(flight)

    def _land(self, flight: Flight) -> None:
        for cluster in range(flight.first, flight.first + flight.size // self.cluster_size):
            del self._flights[cluster]
        self._budget.land(flight)
        self._release(flight)
        self._scheduler.wake()

    def _release(self, flight: Flight) -> None:
        flight.holders -= 1
        if flight.holders == 0:
            self._buffers.give(flight.buffer)


def _fault(flight: Flight) -> QedfsError:
    """The error for an exception that nobody expected: it must cost one flight, not every image of the mount."""
    log.exception("fetch of %d bytes at %d failed", flight.size, flight.pos)
    return QedfsError("internal error, see the log")
