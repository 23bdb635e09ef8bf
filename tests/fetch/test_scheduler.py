"""The sizes of background requests: small beside readers, one large one on a near link, several on a far one."""

from __future__ import annotations

import pytest
import trio

from qedfs.fetch.budget import Budget
from qedfs.fetch.congestion import MAX_REQUEST_BYTES, MIN_REQUEST_BYTES, CongestionWindow
from qedfs.fetch.scheduler import QUIET_SECONDS, Scheduler

from .link import MBIT, run


def turns(*, rate: float, round_trip: float) -> Scheduler:
    """After a stream over such a link."""
    window = CongestionWindow()
    run(window, rate=rate, round_trip=round_trip, seconds=5)
    return Scheduler(window, Budget())


@pytest.mark.parametrize("round_trip", [0.02, 0.2])
@pytest.mark.usefixtures("autojump_clock")
async def test_requests_on_a_far_link_do_not_all_end_together(round_trip: float) -> None:
    far = turns(rate=1000 * MBIT, round_trip=round_trip)
    assert {far.request_bytes() for _ in range(6)} == {MAX_REQUEST_BYTES >> part for part in range(2)}


@pytest.mark.usefixtures("autojump_clock")
async def test_requests_on_a_near_link_are_as_large_as_they_may_be() -> None:
    near = turns(rate=10_000 * MBIT, round_trip=0.0005)
    assert {near.request_bytes() for _ in range(6)} == {MAX_REQUEST_BYTES}


@pytest.mark.usefixtures("autojump_clock")
async def test_requests_on_a_slow_link_are_not_enlarged() -> None:
    slow = turns(rate=20 * MBIT, round_trip=0.02)
    assert len({slow.request_bytes() for _ in range(6)}) == 1


@pytest.mark.usefixtures("autojump_clock")
async def test_requests_beside_a_reader_are_small() -> None:
    far = turns(rate=1000 * MBIT, round_trip=0.2)
    with far.reading():
        assert far.request_bytes() == MIN_REQUEST_BYTES
    assert far.request_bytes() == MIN_REQUEST_BYTES  # it may come back at once


async def test_bytes_gather_only_while_no_reader_is_active(autojump_clock: trio.testing.MockClock) -> None:
    far = turns(rate=1000 * MBIT, round_trip=0.2)
    await trio.sleep(1)
    assert far.gather_seconds() > 0
    with far.reading():
        assert far.gather_seconds() == 0
    assert far.gather_seconds() == 0
    await trio.sleep(QUIET_SECONDS)
    assert far.gather_seconds() > 0
