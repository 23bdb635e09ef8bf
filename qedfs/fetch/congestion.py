"""The congestion window of one source: how many background bytes may be in flight to fill the link, and not more.

Owns the estimate of the link's rate and round trip. Must not know which request is sent next, nor who waits for it
(`scheduler.py`). Pure: the caller reports what was sent and what has arrived. No I/O, no clock.

The bytes in flight that keep a link busy are the product of its rate and its round trip. Both are measured: the rate as
the best one over any interval, the round trip as the shortest time of a request. At first the window grows by the bytes
that arrive, which doubles it every round trip, as long as the rate increases. After that it is a fixed multiple of the
product, as in BBR (Cardwell et al., ACM Queue 2016). Now and then it tries a larger window, because links change. While
it grows, it stays below a larger multiple (START_GAIN), since the rate shows only after some round trips that the link
is full.

On a slow link the round trip cannot be distinguished from the time that our own requests wait for one another. There
the window is bounded by the time that a request takes, because a reader may have to wait behind it, and because each
request has a deadline.
"""

from __future__ import annotations

import math
from collections import deque

MIN_BYTES = 8 << 20
MAX_BYTES = 64 << 20  # bounds the memory for one source's clusters in flight
REQUESTS = 16  # how many requests make up a full window
FEWEST_REQUESTS = 4  # the same on a fast link, where our own work per request matters
REQUEST_SECONDS = 0.02  # transfer time of a request on such a link: 40 times the 0.5 ms of a CPU that it costs us
MIN_REQUEST_BYTES = 256 << 10
MAX_REQUEST_BYTES = 2 << 20  # a reader on a shared link may have to wait for one of these to finish
GAIN = 2.0  # window / (rate x round trip): leaves room for jitter, and for answers that end in bursts
# The same while the window grows. It doubles every round trip, and the rate is known as the average of some round
# trips, so a smaller gain would slow it down.
START_GAIN = 6.0
GROWTH = 1.15  # the rate has grown if it is at least this many times the best one
QUEUE_SECONDS = 5.0  # how long a request may take because of the bytes ahead of it
PROBE_SECONDS = 3.0  # between two tries of a larger window
PROBE = 1.5  # how much larger that window is
QUEUE_MARGIN = 1.25  # a request that takes less than this times its queueing time says nothing about the round trip
# A request is late when it takes longer than LATE_SECONDS, than LATE_ROUND_TRIPS round trips, and than LATE_TRANSFERS
# times what its bytes and those ahead of it need to cross the link.
LATE_SECONDS = 1.0
LATE_ROUND_TRIPS = 4.0
LATE_TRANSFERS = 4.0
# Bytes may gather in the kernel for GATHER_SECONDS, unless that is much of a round trip, or they become too many:
# receiving GATHER_BYTES takes 0.2 ms, and so many bytes fit into the sockets' buffers, which the kernel enlarges while
# we receive from them. If the time is shorter than LEAST_GATHER_SECONDS, the link is so fast or so near that enough
# bytes gather while we work.
GATHER_SECONDS = 0.008
GATHER_ROUND_TRIPS = 0.4
GATHER_BYTES = 1 << 20
LEAST_GATHER_SECONDS = 0.002
DECAY = 0.95  # factor for the best rate after an interval with a lower one, so that a slower link is noticed
MEMORY_SECONDS = 10.0  # how long a measured round trip counts


class CongestionWindow:
    """The window of one source. Times are in seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._bytes = MIN_BYTES  # what the link needs to be busy
        self._bound = MAX_BYTES  # what it can transfer within QUEUE_SECONDS
        self._starting = True  # the window still doubles every round trip
        self._stalls = 0  # intervals in a row in which that did not increase the rate
        self._best = 0.0  # bytes per second
        self._rate = 0.0  # in the last interval
        self._round_trips: deque[tuple[float, float]] = deque()  # (when, seconds), increasing in both
        self._interval_start: float | None = None
        self._interval_from = 0  # bytes received in total when the interval started
        self._next_probe = 0.0

    @property
    def bytes(self) -> int:
        """How many background bytes may be in flight."""
        return min(self._bytes, self._bound)

    @property
    def request_bytes(self) -> int:
        """The best size for a background request: a power of two, so that free buffers fit the next requests.

        Over loopback, a stream with requests of 2 MiB is 1.4 times as fast as with 512 KiB, which is 1/16 of MIN_BYTES.
        """
        fast = min(int(self._best * REQUEST_SECONDS), self.bytes // FEWEST_REQUESTS)
        return max(MIN_REQUEST_BYTES, min(MAX_REQUEST_BYTES, _power_of_two(max(fast, self.bytes // REQUESTS))))

    @property
    def round_trip(self) -> float:
        """The shortest recent time of a request in seconds; 0.05 before the first one."""
        return self._round_trips[0][1] if self._round_trips else 0.05

    @property
    def rate(self) -> float:
        """The estimated rate of the link in bytes per second."""
        return self._best

    @property
    def gather_seconds(self) -> float:
        """For how long the bytes of background requests may gather before they are received; 0: not at all."""
        if not self._best:
            return 0.0
        seconds = min(GATHER_SECONDS, GATHER_ROUND_TRIPS * self.round_trip, GATHER_BYTES / self._best)
        return seconds if seconds >= LEAST_GATHER_SECONDS else 0.0

    def late_after(self, size: int, ahead: int) -> float:
        """After how many seconds a request is late. `ahead`: the bytes in flight when it was sent.

        Infinite while nothing is known about the link.
        """
        if not self._best:
            return math.inf
        return max(LATE_SECONDS, LATE_ROUND_TRIPS * self.round_trip, LATE_TRANSFERS * (ahead + size) / self._best)

    def started(self, now: float, in_flight: int, received: int) -> None:
        """Record that a request is sent. `in_flight`: bytes in flight before it. `received`: total bytes so far."""
        if in_flight == 0:
            # The link was idle, which says nothing about its rate.
            self._interval_start, self._interval_from = now, received

    def arrived(self, now: float, size: int, seconds: float, received: int, ahead: int) -> None:
        """Record that a request of `size` bytes took `seconds`. `ahead`: the bytes in flight when it was sent."""
        if self._shows_round_trip(seconds, ahead + size):
            self._remember(now, seconds)
        if self._starting:
            self._bytes = min(self._multiple(START_GAIN) if self._best else MAX_BYTES, self._bytes + size)
        self._update_bound(size, seconds, ahead + size)
        received_bytes = received - self._interval_from
        if self._interval_start is None or received_bytes < 0:
            self._interval_start, self._interval_from = now, received
            return
        length = now - self._interval_start
        # Only judge an interval that is long enough for the last change of the window to take effect.
        if length < max(0.05, 2 * self.round_trip) or received_bytes < MIN_BYTES:
            return
        self._update(now, received_bytes / length)
        self._interval_start, self._interval_from = now, received

    def _update(self, now: float, rate: float) -> None:
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
            self._bytes = min(MAX_BYTES, int(self._multiple(GAIN) * PROBE))
            self._next_probe = now + PROBE_SECONDS
        else:
            self._bytes = self._multiple(GAIN)

    def _multiple(self, gain: float) -> int:
        """A multiple of the bytes that fill the link, within the bounds of the window."""
        return int(max(MIN_BYTES, min(MAX_BYTES, gain * self._best * self.round_trip)))

    def _update_bound(self, size: int, seconds: float, queued: int) -> None:
        """Lower the bound if a request with `queued` bytes in flight took too long, raise it if it was fast.

        Raising can double it every round trip. This does not need an interval without idle time, because there may be
        none once the bound allows only one request at a time.
        """
        if seconds > QUEUE_SECONDS:
            self._bound = max(MIN_REQUEST_BYTES, min(self._bound, int(queued * QUEUE_SECONDS / seconds)))
        elif seconds < QUEUE_SECONDS / 2:
            self._bound = min(MAX_BYTES, self._bound + size)

    def _shows_round_trip(self, seconds: float, queued: int) -> bool:
        """Whether the time of a request shows the round trip of the link, and not just our own queueing.

        Otherwise a window that is too large would slow down every request, make the round trip look longer, and so grow
        further.
        """
        return not self._rate or seconds < self.round_trip or seconds > QUEUE_MARGIN * queued / self._rate

    def _remember(self, now: float, seconds: float) -> None:
        trips = self._round_trips
        while trips and trips[-1][1] >= seconds:
            trips.pop()
        trips.append((now, seconds))
        while len(trips) > 1 and trips[0][0] < now - MEMORY_SECONDS:
            trips.popleft()


def _power_of_two(size: int) -> int:
    """The power of two that is nearest to `size` by ratio."""
    return 1 << round(math.log2(max(1, size)))
