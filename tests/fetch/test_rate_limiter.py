"""The arithmetic of a limit: what is due when, after a rest, and after a change of the limit."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing

from qedfs.fetch.rate_limiter import BURST_SECONDS, OVERDRAFT_SECONDS, RateLimiter


async def test_a_piece_takes_the_time_that_its_bytes_take_at_the_limit(autojump_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter(100)
    assert limiter.due() == 0
    limiter.sent(500)
    assert limiter.due() == pytest.approx(5)
    await trio.sleep(2)
    assert limiter.due() == pytest.approx(3)


async def test_no_limit_is_never_due_later(mock_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter()
    limiter.sent(1 << 40)
    assert (limiter.due(), limiter.piece_bytes, limiter.overdraft_bytes(1)) == (0, math.inf, math.inf)


async def test_a_rest_of_an_hour_gives_a_quarter_of_a_second(autojump_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter(1000)
    limiter.sent(1)
    await trio.sleep(3600)
    limiter.sent(1000)
    assert limiter.due() == pytest.approx(1 - BURST_SECONDS)


async def test_a_higher_limit_ends_a_wait(autojump_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter(100)
    limiter.sent(1000)
    await trio.sleep(1)
    limiter.limit = 900
    assert limiter.due() == pytest.approx(1)


async def test_who_waits_feels_a_new_limit_at_once(autojump_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter(1)
    limiter.sent(1000)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limiter.until_due)
        await trio.sleep(10)
        limiter.limit = 99
    assert trio.current_time() - began == pytest.approx(20)


async def test_a_lower_limit_makes_no_wait_longer(mock_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter(1000)
    limiter.sent(1000)
    limiter.limit = 1
    assert limiter.due() == pytest.approx(1)


async def test_what_was_sent_without_a_limit_is_not_made_up_for(mock_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter()
    limiter.sent(1 << 40)
    limiter.limit = 1
    assert limiter.due() == 0


async def test_an_overdraft_is_paid_back(autojump_clock: trio.testing.MockClock) -> None:
    limiter = RateLimiter(1000)
    limiter.sent(int(limiter.overdraft_bytes(1)))
    assert limiter.overdraft_bytes(1) == 0
    await trio.sleep(OVERDRAFT_SECONDS)
    assert limiter.due() == 0
    assert limiter.overdraft_bytes(4096) == 2 * 4096
