"""A link in numbers: a rate and a round trip, and a window that is kept full over it. No I/O, no clock."""

from __future__ import annotations

import heapq

from qedfs.fetch.congestion import CongestionWindow

MBIT = 1e6 / 8  # bytes per second


def run(
    window: CongestionWindow, *, rate: float, round_trip: float, seconds: float, start: float = 0.0
) -> tuple[float, float]:
    """Keep the window full on a link that serves requests one behind the other; returns (bytes per second, end)."""
    now, free_at, received, in_flight = start, start, 0, 0
    under_way: list[tuple[float, float, int, int]] = []
    counted_from, counted = start + seconds / 2, 0
    while now < start + seconds:
        while in_flight < window.bytes:
            size = window.request_bytes
            window.started(now, in_flight, received)
            free_at = max(free_at, now + round_trip) + size / rate
            heapq.heappush(under_way, (free_at, now, size, in_flight))
            in_flight += size
        now, began, size, behind = heapq.heappop(under_way)
        in_flight -= size
        received += size
        counted += size if now > counted_from else 0
        window.arrived(now, size, now - began, received, behind)
    return counted / (now - counted_from), now
