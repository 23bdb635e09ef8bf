"""The fetch queue of one source: fetches each cluster once, for any number of readers and overlays.

Owns the flights (requests to the source). `scheduler.py` decides when a background request may be sent. Must not know
overlays: what stores the bytes is a `Consumer`.

Concurrency protocol
--------------------
- A *flight* carries neighbouring clusters from the source. `_flights` maps each cluster to its flight, from the request
  until the flight has *landed*, which is when every consumer has adopted it. A reader or consumer of a cluster in
  flight joins that flight. So each cluster crosses the wire once, however many readers and overlays want it.
- The bytes are available once `arrived` is set. Readers copy what they need and do not wait for the adoption.
- Each consumer adopts in a task of its own. A consumer whose disk hangs delays only its own requests. It is offered no
  more bytes once half of the budget waits for it (`budget.py`).
- A flight runs in a task of the nursery, not of the reader that caused it. Killing a reader ends no flight.
- There is no await between the look-up and the registration of a flight.
- The buffer of a flight returns to the pool when the flight has no readers and consumers left (`Flight.holders`).
- A background flight may take minutes, on a slow link or because its answer is lost. A reader that finds it late
  (`_late_at`) requests just its own bytes urgently. The first answer wins. Only the flight's bytes are adopted.
- Order: a reader's request is sent at once. All others wait for their turn.

Memory: the flights of a queue hold at most MOST_HELD_BYTES, whatever the cluster size, and less if other queues need
the memory (`memory_pool.py`). `bring`, which serves a command of the user, may exceed that by one request. If there is
no room for a flight, or if clusters are larger than LARGE_CLUSTER_BYTES, a reader gets only the bytes that it asked
for. They go straight into its own buffer and are not adopted; another bound covers all such readers. In addition there
are the free buffers (`buffer_pool.py`) and, for each image, the rest of partially written clusters (`rmw_budget.py`).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence

import trio

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.fetch.budget import Budget
from qedfs.fetch.buffer_pool import BufferPool
from qedfs.fetch.comeback import Comeback
from qedfs.fetch.congestion import CongestionWindow
from qedfs.fetch.flight import Consumer, Flight
from qedfs.fetch.latency import Histogram
from qedfs.fetch.scheduler import Scheduler
from qedfs.fetch.total_limit import TotalLimit
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share
from qedfs.source.base import Extent, Identity
from qedfs.source.retrying import RetryingSource
from qedfs.source.zeros import clear

log = logging.getLogger(__name__)

Part = tuple[int, memoryview, Flight | None]  # a part of a read: position, buffer, and the flight that carries it

LATE_DEADLINES = 1 / 3  # how long, in deadlines, a reader waits for a background flight at most
# A reader does not wait for a whole cluster larger than this. Only the background fetches such clusters.
LARGE_CLUSTER_BYTES = 4 << 20


class FetchQueue:
    """The fetch queue of one source, for one cluster size."""

    def __init__(
        self,
        remote: RetryingSource,
        cluster_size: int,
        nursery: trio.Nursery,
        *,
        buffers: BufferPool | None = None,
        total: TotalLimit | None = None,
    ) -> None:
        """`buffers` and `total`: shared with the queues of other sources, so that the bounds are for all of them."""
        self.remote = remote
        self.cluster_size = cluster_size
        self.window = CongestionWindow()
        self.consumers: list[Consumer] = []  # those that may want what others fetch
        self.fetched_bytes = 0
        self.waits = Histogram()  # of readers, from the request to the last byte or the error
        self.nursery = nursery
        self.comeback = Comeback(remote, nursery)
        self._flights: dict[int, Flight] = {}
        self._buffers = buffers or BufferPool()
        self._total = total or TotalLimit()
        self._large = cluster_size > LARGE_CLUSTER_BYTES
        self._budget = Budget()
        self._alone = Share(memory_pool.ALONE)
        self._scheduler = Scheduler(self.window, self._budget)
        self._parted: weakref.WeakSet[Consumer] = weakref.WeakSet()

    def part(self, consumer: Consumer) -> None:
        """Never hand anything over to this consumer again, not even what is in flight: it does not want it any more."""
        self._parted.add(consumer)
        self.consumers = [one for one in self.consumers if one is not consumer]
        self._scheduler.wake()

    @property
    def readers(self) -> int:
        """How many readers wait for bytes, or for the first connection."""
        return self._scheduler.readers

    @property
    def background_bytes(self) -> int:
        """Bytes in flight, excluding urgent flights."""
        return self._budget.background

    def background_request_bytes(self) -> int:
        """The size for the next background request. It varies from call to call."""
        return self._scheduler.request_bytes()

    async def identity(self) -> Identity:
        """The version that the source serves. Connects if necessary. Raises the errors of the source."""
        return self.remote.identity or await self.remote.connect()

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """Which parts of the source read as zeros. Raises the errors of the source."""
        return await self.remote.extents(pos, size)

    # For readers.

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """The context of a reader's whole wait, including the first connection and the check of the version.

        Meanwhile, and for a moment after, background requests hold back. The deadline ends the wait, whichever step it
        is in: a step may have a deadline of its own, and a background flight has more time than a reader. If the source
        is dead, the wait ends sooner (`RetryingSource.reader`).

        Raises:
            SourceUnreachable: the time is up, or the source is dead.
        """
        started = trio.current_time()
        try:
            with self._scheduler.reading():
                self.remote.gather(0)
                async with self.remote.reader():
                    yield
        finally:
            self.waits.note(trio.current_time() - started)

    async def read(self, pieces: Sequence[tuple[int, memoryview]], *, consumer: Consumer | None) -> None:
        """Fill each view with the image's bytes at its position. Call it inside `waiting`.

        Raises the errors of the source.
        """
        source_size = (await self.identity()).size
        if consumer is None:  # nobody would store the zeros
            pieces = [piece for piece in pieces if not self._fill_known_zeros(*piece)]
        # Join all flights before the first wait. A cluster that landed during a wait would be fetched again.
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
        """Fill the view if the source knows that the range is a hole. A flight of zeros costs five times as much."""
        if not self.remote.zeros_now(pos, len(view)):
            return False
        clear(view)
        return True

    def _parts(self, pos: int, view: memoryview, source_size: int, consumer: Consumer | None) -> Iterator[Part]:
        """Split a piece at the borders of flights, and hold those. A flight is None if there is no room for it."""
        first, end = pos // self.cluster_size, pos + len(view)
        count = -(-end // self.cluster_size) - first
        for stop, flight in self._join(first, count, source_size, consumer, asked=True, urgent=True):
            size = min(stop * self.cluster_size, end) - pos
            yield pos, view[:size], flight
            pos, view = pos + size, view[size:]

    async def _copy(self, flight: Flight, pos: int, view: memoryview, source_size: int) -> None:
        """Copy the bytes from the flight. If that is a background flight and late, also request them directly."""
        if not (flight.urgent or await flight.arrives(self._late_at(flight))):
            flight.overdue = True
            with trio.CancelScope() as race:
                flight.rivals.append(race)
                await self._read_alone(pos, view, source_size)
                return
        await flight.copy_to(pos, view)

    def _late_at(self, flight: Flight) -> float:
        """The time up to which a reader that arrives now waits for a background flight."""
        now = trio.current_time()
        if flight.overdue:
            return now
        late = flight.since + self.window.late_after(flight.size, flight.ahead_bytes)
        return min(late, now + LATE_DEADLINES * self.remote.deadline_seconds)

    async def _read_alone(self, pos: int, view: memoryview, source_size: int) -> None:
        """Fetch bytes for one reader only, straight into its buffer."""
        wanted = max(0, min(len(view), source_size - pos))
        if wanted:
            # The buffer of a reader takes memory only once bytes are written to it. Without a bound, a server that
            # sends half of each answer could fill the buffers of all readers.
            while not self._alone.fits(wanted):
                await self._alone.change()
            self._alone.take(wanted)
            if self.remote.is_dead:
                self.nursery.start_soon(self.comeback.probe, pos)
            try:
                await self.remote.read(pos, view[:wanted], urgent=True)
            finally:
                self._alone.give(wanted)
        view[wanted:] = bytes(len(view) - wanted)
        self.fetched_bytes += wanted

    # For the background: read-ahead and stream.

    def ahead(self, first: int, count: int, *, consumer: Consumer) -> int:
        """Start to fetch clusters that a sequential reader will want soon. Does not wait for them.

        Returns the number of clusters that it could start to fetch, since there may not be room for all.
        """
        step = max(1, self.window.request_bytes // self.cluster_size)
        for at in range(first, first + count, step):
            size = step * self.cluster_size
            if not self._has_room(step) or self._budget.is_behind(consumer, size, background=True):
                return at - first
            self._send(at, min(step, first + count - at), consumer, asked=True, urgent=False)
        return count

    def piece_bytes(self, consumer: Consumer) -> float:
        """The maximal size of a background request for this consumer under the limits; infinite without any."""
        return min(consumer.limiter.piece_bytes, self._total.limiter.piece_bytes)

    async def turn(self, first: int, count: int, *, consumer: Consumer, preferred: bool = False) -> None:
        """Wait until a background request for these clusters may be sent: for the link, and for the limit of the mount.

        `preferred`: a reader will soon want them. The caller waits for the limit of the consumer itself.

        Returns without a wait if all of them are in flight already. During the wait, another task may have fetched the
        clusters. So the caller must check again, and call `start` without an await in between.
        """
        await self.identity()
        size = count * self.cluster_size
        while any(cluster not in self._flights for cluster in range(first, first + count)):
            await self._scheduler.turn(consumer, size, preferred=preferred)
            # During a wait for the limit, readers may have come.
            if not await self._total.turn(consumer, size) or self._scheduler.may_send(
                consumer, size, preferred=preferred
            ):
                return

    def start(self, first: int, count: int, *, consumer: Consumer, asked: bool = False) -> None:
        """Fetch clusters that nobody waits for. Does nothing before the first connection (`identity`).

        Counts them against the limit of the consumer, and of all others that will take them. If these were counted at
        the arrival, several images of one source would send a request each whenever their time has come. Then each
        would get the bytes of all.
        """
        end = (first + count) * self.cluster_size
        under_way = {self._flights.get(cluster) for cluster in range(first, first + count)}
        for flight in self._send(first, count, consumer, asked=asked, urgent=False):
            if flight not in under_way:
                flight.cost = self._inside(flight)
                self._total.sent(consumer, flight.cost)
            whole = asked or not consumer.limiter.limit
            self._count(flight, consumer, flight.size if whole else min(flight.size, end - flight.pos))
            for other in self.consumers:
                if (other.limiter.limit or self._total.limiter.limit) and other not in flight.consumers:
                    self._claim(flight, other)

    async def bring(self, first: int, count: int, *, consumer: Consumer) -> list[Flight]:
        """Fetch clusters for a consumer that waits for them. Call it inside `waiting`. Raises the errors of the source.

        Returns when the bytes have arrived; `adopted` waits until the consumer has adopted them.
        """
        await self.identity()
        flights = self._send(first, count, consumer, asked=True, urgent=True)
        for flight in flights:
            await flight.arrived.wait()
            if flight.error is not None:
                raise flight.error.fresh()
        return flights

    async def adopted(self, flights: Sequence[Flight], *, consumer: Consumer) -> None:
        """Wait until this consumer has adopted the bytes of these flights."""
        while any(consumer in flight.consumers for flight in flights):
            await self._scheduler.change()

    def flights(self) -> list[Flight]:
        """All flights, the oldest first."""
        return sorted(set(self._flights.values()), key=lambda flight: flight.since)

    def in_flight(self, cluster: int) -> bool:
        """Whether a flight carries this cluster."""
        return cluster in self._flights

    async def landed(self, consumer: Consumer) -> None:
        """Wait until there is no flight for this consumer, or it takes nothing any more."""
        while self._budget.held_for(consumer) and consumer not in self._parted:
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
        """The flights that carry these clusters, in order, each with its end. Starts those that are missing.

        Each flight is held until the caller passes it to `_release`. If there is no room for a flight, it is None;
        with `needed`, it is started all the same.
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
                flight = None  # to wait for a whole cluster would take too long
            if flight is not None:
                if consumer is not None:
                    self._offer(flight, consumer)
                    if asked and consumer not in flight.askers:
                        flight.askers.append(consumer)
                flight.holders += 1
                stop = flight.first + flight.size // self.cluster_size
            found.append((stop, flight))
            cluster = stop
        return found

    def _send(self, first: int, count: int, consumer: Consumer, *, asked: bool, urgent: bool) -> list[Flight]:
        """Join or start the flights that bring these clusters to a consumer."""
        identity = self.remote.identity
        if identity is None:
            return []
        found = self._join(first, count, identity.size, consumer, asked=asked, urgent=urgent, needed=True)
        flights = [flight for _, flight in found if flight is not None]
        for flight in flights:
            self._release(flight)
        return flights

    def _has_room(self, count: int) -> bool:
        """Whether there is room to fetch `count` clusters for a reader or for read-ahead."""
        return not self._large and self._budget.has_room(count * self.cluster_size)

    def _offer(self, flight: Flight, consumer: Consumer) -> None:
        """Make `consumer` a consumer of the flight, unless it lags too far behind."""
        if consumer in flight.consumers or self._budget.is_behind(consumer, flight.size):
            return
        if flight.arrived.is_set():
            self.nursery.start_soon(self._hand_over, flight, consumer)
        self._budget.join(flight, consumer)

    def _claim(self, flight: Flight, consumer: Consumer) -> bool:
        """Count a flight of another consumer against the limit of this one, or as much of it as that allows.

        Returns False if it takes nothing: it does not want the bytes, has them, or its limit is used up. Such bytes may
        have to be fetched again.
        """
        if consumer in flight.shares:
            return True
        if not consumer.wants(flight.pos, flight.size):
            return False
        size = flight.size
        if consumer.limiter.limit:
            room = min(size, consumer.limiter.overdraft_bytes(self.cluster_size))
            size = int(room // self.cluster_size) * self.cluster_size
            if size <= 0 or not consumer.lacks(flight.pos, size):
                return False
        self._count(flight, consumer, size)
        return True

    def _count(self, flight: Flight, consumer: Consumer, size: int) -> None:
        """Count the first `size` bytes of a flight against a consumer's limit, unless they were counted before."""
        counted = flight.shares.get(consumer, 0)
        if size > counted:
            flight.shares[consumer] = size
            if consumer.limiter.limit:
                consumer.limiter.sent(consumer.lacks(flight.pos + counted, size - counted))
            self._total.got(consumer, size - counted)

    def _inside(self, flight: Flight) -> int:
        """How many bytes of a flight are inside the source. The rest is zeros."""
        identity = self.remote.identity
        return 0 if identity is None else max(0, min(flight.size, identity.size - flight.pos))

    def _start(self, first: int, count: int, source_size: int, consumer: Consumer | None, *, urgent: bool) -> Flight:
        pos = first * self.cluster_size
        size = count * self.cluster_size  # whole clusters, even at the end, as images of other sizes share the flight
        now = trio.current_time()
        flight = Flight(first, pos, size, self._buffers.take(count * self.cluster_size), since=now, urgent=urgent)
        # Before the registration, because this may fail: readers would wait for ever for a flight without a task.
        self.nursery.start_soon(self._fly, flight, max(0, min(size, source_size - pos)))
        # Counted here, not in the flight's task, which runs at the next await. The next request must see the count.
        flight.ahead_bytes = self._budget.in_flight(consumer)
        self.window.started(now, flight.ahead_bytes, self.remote.received)
        self._budget.start(flight)
        if not urgent:
            self.remote.gather(self._scheduler.gather_seconds())
        for cluster in range(first, first + count):
            self._flights[cluster] = flight
        return flight

    async def _fly(self, flight: Flight, wanted: int) -> None:
        """Run one flight to its end. `wanted` bytes are inside the source, the rest is zeros."""
        # The error if this task is cancelled. Without it, readers would use the contents of the buffer.
        flight.error = SourceUnreachable(f"backing {self.remote.location}: closed")
        try:
            await self._bring(flight, wanted)
            flight.error = None
            for consumer in self.consumers:
                if consumer not in flight.consumers and self._claim(flight, consumer):
                    self._offer(flight, consumer)
        except QedfsError as exc:
            flight.error = exc
        except Exception:
            flight.error = flight.fault()
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
            read = await self.remote.read(flight.pos, view[:wanted], urgent=flight.urgent, patient=not flight.urgent)
            if flight.cost:
                self._total.arrived(read, expected=flight.cost)
        view[wanted:] = bytes(len(view) - wanted)
        if not wanted:
            return  # past the source's end: this says nothing about the link
        self.fetched_bytes += wanted
        now = trio.current_time()
        self.window.arrived(now, wanted, now - started, self.remote.received, flight.ahead_bytes)

    def _arrived(self, flight: Flight) -> list[Consumer]:
        """Wake the readers and count the arrival. Returns the consumers that have to adopt the bytes."""
        flight.arrive()
        self._budget.arrive(flight)
        if flight.error is not None:
            # Tell the consumers, which would otherwise request the clusters again at once.
            for consumer in list(flight.consumers):
                if consumer not in self._parted:
                    consumer.lost(flight.error)
                self._budget.leave(flight, consumer)
        if flight.consumers:
            self._scheduler.wake()
        else:
            self._land(flight)
        return list(flight.consumers)

    async def _hand_over(self, flight: Flight, consumer: Consumer) -> None:
        asked = consumer in flight.askers
        size = flight.size if asked else flight.shares.get(consumer, flight.size)
        try:
            if consumer not in self._parted:
                await consumer.take(flight.pos, flight.buffer, size, asked=asked)
        except Exception:
            # A consumer handles its own failures, so this is a bug. It must affect this flight only.
            consumer.lost(flight.fault())
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
