"""The window finds the size that fills a link, on links of any round trip and rate."""

from __future__ import annotations

import heapq

import pytest

from qedfs.window import MAX_BYTES, MIN_BYTES, Window

MBIT = 1e6 / 8


def run(window: Window, *, rate: float, round_trip: float, seconds: float, start: float = 0.0) -> tuple[float, float]:
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


@pytest.mark.parametrize("round_trip", [0.0005, 0.005, 0.02, 0.08, 0.2])
@pytest.mark.parametrize("rate", [20 * MBIT, 100 * MBIT, 1000 * MBIT])
def test_it_fills_the_link(rate: float, round_trip: float) -> None:
    reached, _ = run(Window(), rate=rate, round_trip=round_trip, seconds=20)
    assert reached > 0.97 * rate


@pytest.mark.parametrize(("rate", "round_trip"), [(1000 * MBIT, 0.02), (1000 * MBIT, 0.2), (100 * MBIT, 0.02)])
def test_it_does_not_queue_much_more_than_the_link_needs(rate: float, round_trip: float) -> None:
    window = Window()
    run(window, rate=rate, round_trip=round_trip, seconds=20)
    # A probe for a faster link may be under way.
    assert window.bytes <= 1.5 * max(MIN_BYTES, 3 * rate * round_trip)
    assert window.bytes <= MAX_BYTES


def test_it_follows_a_link_that_becomes_slower_and_faster() -> None:
    window = Window()
    _, now = run(window, rate=1000 * MBIT, round_trip=0.1, seconds=20)
    wide = window.bytes
    _, now = run(window, rate=50 * MBIT, round_trip=0.1, seconds=60, start=now)
    assert window.bytes < wide / 2
    reached, _ = run(window, rate=1000 * MBIT, round_trip=0.1, seconds=30, start=now)
    assert reached > 0.9 * 1000 * MBIT


def test_sixteen_requests_are_in_flight_from_the_start() -> None:
    window = Window()
    assert window.bytes // window.request_bytes >= 16


@pytest.mark.parametrize(("rate", "size"), [(1000 * MBIT, 512 << 10), (4000 * MBIT, 1000 << 10), (1.2e9, 2 << 20)])
def test_a_fast_link_gets_larger_requests(rate: float, size: int) -> None:
    window = Window()
    run(window, rate=rate, round_trip=0.001, seconds=2)
    assert window.request_bytes == pytest.approx(size, rel=0.1)
    assert window.bytes // window.request_bytes >= 4
