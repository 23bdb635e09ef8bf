"""The window finds the size that fills a link, on links of any round trip and rate."""

from __future__ import annotations

import pytest

from qedfs.fetch.congestion import (
    MAX_BYTES,
    MIN_BYTES,
    MIN_REQUEST_BYTES,
    QUEUE_SECONDS,
    START_GAIN,
    CongestionWindow,
)

from .link import MBIT, run


@pytest.mark.parametrize("round_trip", [0.0005, 0.005, 0.02, 0.08, 0.2])
@pytest.mark.parametrize("rate", [20 * MBIT, 100 * MBIT, 1000 * MBIT])
def test_it_fills_the_link(rate: float, round_trip: float) -> None:
    reached, _ = run(CongestionWindow(), rate=rate, round_trip=round_trip, seconds=20)
    assert reached > 0.97 * rate


@pytest.mark.parametrize(("rate", "round_trip"), [(1000 * MBIT, 0.02), (1000 * MBIT, 0.2), (100 * MBIT, 0.02)])
def test_it_does_not_queue_much_more_than_the_link_needs(rate: float, round_trip: float) -> None:
    window = CongestionWindow()
    run(window, rate=rate, round_trip=round_trip, seconds=20)
    # A probe for a faster link may be under way.
    assert window.bytes <= 1.5 * max(MIN_BYTES, 3 * rate * round_trip)
    assert window.bytes <= MAX_BYTES


class Watched(CongestionWindow):
    """Notes how large it has been."""

    most = 0

    def arrived(self, *told: float) -> None:
        super().arrived(*told)  # type: ignore[arg-type] # passed on as they are
        self.most = max(self.most, self.bytes)


@pytest.mark.parametrize(("rate", "round_trip"), [(1000 * MBIT, 0.02), (100 * MBIT, 0.02), (1000 * MBIT, 0.005)])
def test_while_it_grows_it_stays_within_a_multiple_of_what_the_link_needs(rate: float, round_trip: float) -> None:
    """Each request of a larger window needs a fresh buffer, and too many of them are dropped a moment later."""
    window = Watched()
    reached, _ = run(window, rate=rate, round_trip=round_trip, seconds=2)
    assert reached > 0.97 * rate
    # Until something is known of the rate, it doubles once.
    assert window.most <= max(2 * MIN_BYTES, 1.25 * START_GAIN * rate * round_trip)


def test_a_long_link_is_filled_within_a_second() -> None:
    reached, _ = run(CongestionWindow(), rate=1000 * MBIT, round_trip=0.2, seconds=1)
    assert reached > 0.85 * 1000 * MBIT  # in the second half of it


def test_it_follows_a_link_that_becomes_slower_and_faster() -> None:
    window = CongestionWindow()
    _, now = run(window, rate=1000 * MBIT, round_trip=0.1, seconds=20)
    wide = window.bytes
    _, now = run(window, rate=50 * MBIT, round_trip=0.1, seconds=70, start=now)
    assert window.bytes < wide / 2
    reached, _ = run(window, rate=1000 * MBIT, round_trip=0.1, seconds=30, start=now)
    assert reached > 0.9 * 1000 * MBIT


def test_sixteen_requests_are_in_flight_from_the_start() -> None:
    window = CongestionWindow()
    assert window.bytes // window.request_bytes >= 16


@pytest.mark.parametrize(("rate", "size"), [(150 * MBIT, 512 << 10), (500 * MBIT, 1 << 20), (1000 * MBIT, 2 << 20)])
def test_a_fast_link_gets_larger_requests(rate: float, size: int) -> None:
    window = CongestionWindow()
    run(window, rate=rate, round_trip=0.001, seconds=2)
    assert window.request_bytes == size
    assert window.bytes // window.request_bytes >= 4


@pytest.mark.parametrize("round_trip", [0.02, 0.6])
@pytest.mark.parametrize("rate", [0.4 * MBIT, 1 * MBIT, 5 * MBIT])
def test_on_a_slow_link_what_is_in_flight_takes_seconds(rate: float, round_trip: float) -> None:
    window = CongestionWindow()
    _, now = run(window, rate=rate, round_trip=round_trip, seconds=120)
    assert window.bytes <= max(MIN_REQUEST_BYTES, 1.1 * QUEUE_SECONDS * rate)
    reached, _ = run(window, rate=rate, round_trip=round_trip, seconds=120, start=now)
    assert reached > 0.9 * rate


def test_one_slow_answer_makes_no_slow_link() -> None:
    window = CongestionWindow()
    window.started(0, 0, 0)
    window.arrived(60, MIN_REQUEST_BYTES, 60, MIN_REQUEST_BYTES, 0)
    assert window.bytes == MIN_REQUEST_BYTES
    reached, _ = run(window, rate=1000 * MBIT, round_trip=0.1, seconds=10, start=60)
    assert reached > 0.9 * 1000 * MBIT


@pytest.mark.parametrize("rate", [3 * MBIT, 130 * MBIT, 480 * MBIT, 1100 * MBIT, 9000 * MBIT])
@pytest.mark.parametrize("round_trip", [0.001, 0.03, 0.15])
def test_a_link_whose_rate_varies_reuses_its_buffers(rate: float, round_trip: float) -> None:
    """Buffers are pooled by size, so there must be few sizes: a fresh buffer costs as much as to copy its bytes."""
    window, sizes, now = CongestionWindow(), set(), 0.0
    for part in range(20):
        _, now = run(window, rate=rate * (0.8 + 0.02 * part), round_trip=round_trip, seconds=1, start=now)
        sizes.add(window.request_bytes)
    assert sizes <= {256 << 10, 512 << 10, 1 << 20, 2 << 20}


def test_bytes_gather_for_a_small_part_of_the_round_trip() -> None:
    window = CongestionWindow()
    assert window.gather_seconds == 0  # nothing is known about the link
    run(window, rate=1000 * MBIT, round_trip=0.02, seconds=5)
    assert window.gather_seconds == pytest.approx(0.008, rel=0.1)
    near = CongestionWindow()
    run(near, rate=100 * MBIT, round_trip=0.008, seconds=5)
    assert near.gather_seconds <= near.round_trip * 0.4


@pytest.mark.parametrize(("rate", "round_trip"), [(5000 * MBIT, 0.02), (10_000 * MBIT, 0.0002)])
def test_a_fast_link_is_not_slowed_by_gathering(rate: float, round_trip: float) -> None:
    window = CongestionWindow()
    run(window, rate=rate, round_trip=round_trip, seconds=5)
    assert window.gather_seconds == 0
