"""How many bytes may be in flight in the background: enough to fill the link, not more.

Owns the estimate of the link. Pure: it is told what was started and what has arrived, and asked; no I/O, no clock.

The product of the link's rate and its round trip is what has to be in flight to keep it busy. Both are measured: the
rate as the most that has arrived in a stretch of time, the round trip as the shortest time that a request has taken. At
first the window grows by what arrives, which doubles it every round trip, for as long as that brings more bytes;
afterwards it is a fixed multiple of the product (as BBR does, Cardwell et al., ACM Queue 2016), and tries a larger one
now and then, since links change.

On a slow link the round trip cannot be told from the time that our own requests spend behind one another. What is in
flight there is bounded by that time itself: a reader may have to wait behind it, and each request has a deadline.
"""

from __future__ import annotations

import math
from collections import deque

MIN_BYTES = 8 << 20
MAX_BYTES = 64 << 20  # what the fetched clusters of one source may take in memory
REQUESTS = 16  # in flight in a full window
FEWEST_REQUESTS = 4  # on a link so fast that our own work for each request counts
REQUEST_SECONDS = 0.002  # that a request takes such a link: some times our work for it, 0.3 ms of a processor
MIN_REQUEST_BYTES = 256 << 10
MAX_REQUEST_BYTES = 2 << 20  # a reader on a shared link may have to wait for one of these to end
GAIN = 2.0  # of the window over rate x round trip: room for jitter, and for answers that end together in lumps
GROWTH = 1.15  # a smaller gain in rate is none
QUEUE_SECONDS = 5.0  # that a request may take because of what is in flight before it
PROBE_SECONDS = 3.0
PROBE = 1.5  # times the window, to see whether the link has become faster
QUEUE_MARGIN = 1.25  # a request that takes less than this times its queue's length says nothing of the round trip
# A request is late after the longest of these: seconds, round trips, or times of what was to cross the link before it.
LATE_SECONDS = 1.0
LATE_ROUND_TRIPS = 4.0
LATE_TRANSFERS = 4.0
DECAY = 0.95  # of the best rate in every stretch that does not reach it, so that a slower link is noticed
MEMORY_SECONDS = 10.0  # how long a measurement counts


class CongestionWindow:
    """The window of one source. Times in seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._bytes = MIN_BYTES  # that the link needs
        self._bound = MAX_BYTES  # that it takes within QUEUE_SECONDS
        self._starting = True
        self._stalls = 0
        self._best = 0.0  # bytes per second
        self._rate = 0.0  # of the last stretch
        self._round_trips: deque[tuple[float, float]] = deque()  # (when, seconds), increasing in both
        self._stretch_start: float | None = None
        self._stretch_from = 0
        self._next_probe = 0.0

    @property
    def bytes(self) -> int:
        """That may be in flight in the background."""
        return min(self._bytes, self._bound)

    @property
    def request_bytes(self) -> int:
        """A good size for one background request.

        Over loopback a stream with 2 MiB is 1.4 times as fast as one with 512 KiB, a sixteenth of the least window.
        """
        fast = min(int(self._best * REQUEST_SECONDS), self.bytes // FEWEST_REQUESTS)
        return max(MIN_REQUEST_BYTES, min(MAX_REQUEST_BYTES, max(fast, self.bytes // REQUESTS)))

    @property
    def round_trip(self) -> float:
        """The shortest time that a request took lately; 0.05 before there was one."""
        return self._round_trips[0][1] if self._round_trips else 0.05

    @property
    def rate(self) -> float:
        """Bytes per second that the link has shown."""
        return self._best

    def late_after(self, size: int, behind: int) -> float:
        """Seconds after which a request that left behind so many bytes is late; infinite while nothing is known."""
        if not self._best:
            return math.inf
        return max(LATE_SECONDS, LATE_ROUND_TRIPS * self.round_trip, LATE_TRANSFERS * (behind + size) / self._best)

    def started(self, now: float, in_flight: int, received: int) -> None:
        """A request leaves; `in_flight` bytes were in flight before it, `received` have come so far in all."""
        if in_flight == 0:
            # An idle stretch says nothing about the link.
            self._stretch_start, self._stretch_from = now, received

    def arrived(self, now: float, size: int, seconds: float, received: int, behind: int) -> None:
        """A request of `size` bytes has taken `seconds`; `behind` bytes were in flight when it left."""
        if self._tells_round_trip(seconds, behind + size):
            self._remember(now, seconds)
        if self._starting:
            self._bytes = min(MAX_BYTES, self._bytes + size)
        self._note_queue(size, seconds, behind + size)
        come = received - self._stretch_from
        if self._stretch_start is None or come < 0:
            self._stretch_start, self._stretch_from = now, received
            return
        length = now - self._stretch_start
        # Long enough that the requests of the last change are behind us.
        if length < max(0.05, 2 * self.round_trip) or come < MIN_BYTES:
            return
        self._judge(now, come / length)
        self._stretch_start, self._stretch_from = now, received

    def _judge(self, now: float, rate: float) -> None:
        grown = rate > self._best * GROWTH
        self._rate = rate
        self._best = max(rate, self._best * DECAY)
        if self._starting:
            self._stalls = 0 if grown else self._stalls + 1
            if self._stalls >= 2:
                self._starting = False
                self._next_probe = now + PROBE_SECONDS
            else:
                return
        elif grown:
            self._starting, self._stalls = True, 0
        if now >= self._next_probe:
            self._bytes = min(MAX_BYTES, int(self._target() * PROBE))
            self._next_probe = now + PROBE_SECONDS
        else:
            self._bytes = self._target()

    def _target(self) -> int:
        return int(max(MIN_BYTES, min(MAX_BYTES, GAIN * self._best * self.round_trip)))

    def _note_queue(self, size: int, seconds: float, queued: int) -> None:
        """Bound what is in flight if a request among so many bytes has taken long; else let it double every round trip.

        This asks for no stretch without idle time: there may be none while one request at a time is all that is left.
        """
        if seconds > QUEUE_SECONDS:
            self._bound = max(MIN_REQUEST_BYTES, min(self._bound, int(queued * QUEUE_SECONDS / seconds)))
        elif seconds < QUEUE_SECONDS / 2:
            self._bound = min(MAX_BYTES, self._bound + size)

    def _tells_round_trip(self, seconds: float, queued: int) -> bool:
        """Whether the time of a request is the link's, and not that of the bytes which we had put before it.

        Without this a window that queues makes every request slow, the round trip look long, and the window grow.
        """
        return not self._rate or seconds < self.round_trip or seconds > QUEUE_MARGIN * queued / self._rate

    def _remember(self, now: float, seconds: float) -> None:
        trips = self._round_trips
        while trips and trips[-1][1] >= seconds:
            trips.pop()
        trips.append((now, seconds))
        while len(trips) > 1 and trips[0][0] < now - MEMORY_SECONDS:
            trips.popleft()
