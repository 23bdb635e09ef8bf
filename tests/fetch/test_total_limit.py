"""The limit of a mount: whose turn it is, and what ends a wait."""

from __future__ import annotations

import functools
from typing import cast

import pytest
import trio
import trio.testing

from qedfs.fetch.flight import Consumer
from qedfs.fetch.total_limit import TotalLimit

pytestmark = pytest.mark.sweep

LIMIT = 1000


class Somebody:
    """As much of a consumer as the limit looks at."""


def somebody() -> Consumer:
    return cast("Consumer", Somebody())


async def sends(total: TotalLimit, consumer: Consumer, size: int, sent: list[int], *, others: list[Consumer]) -> None:
    """Sends requests of `size` for ever, which `others` take as well. Counts them in the only element of `sent`."""
    while True:
        await total.turn(consumer, size)
        total.sent(consumer, size)
        for each in (consumer, *others):
            total.got(each, size)
        sent[0] += size
        await trio.lowlevel.checkpoint()


async def shares(total: TotalLimit, *sizes: int, seconds: float = 100) -> list[int]:
    """What consumers with requests of these sizes get."""
    counts = [[0] for _ in sizes]
    async with trio.open_nursery() as nursery:
        for size, sent in zip(sizes, counts, strict=True):
            nursery.start_soon(functools.partial(sends, total, somebody(), size, sent, others=[]))
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()
    return [count for (count,) in counts]


async def test_all_get_the_same_whatever_the_size_of_their_requests(autojump_clock: trio.testing.MockClock) -> None:
    found = await shares(TotalLimit(LIMIT), 10, 50, 250)
    for size in found:
        assert size == pytest.approx(100 * LIMIT / 3, rel=0.05)


async def test_a_group_gets_as_much_as_one(autojump_clock: trio.testing.MockClock) -> None:
    """Three images of one source take what each of them fetches. A fourth, of another source, has half of the link."""
    total, group, alone = TotalLimit(LIMIT), [somebody() for _ in range(3)], somebody()
    counts = [[0] for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for one, sent in zip(group, counts, strict=False):
            others = [each for each in group if each is not one]
            nursery.start_soon(functools.partial(sends, total, one, 20, sent, others=others))
        nursery.start_soon(lambda: sends(total, alone, 20, counts[3], others=[]))
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert counts[3][0] == pytest.approx(50 * LIMIT, rel=0.05)
    assert sum(count for (count,) in counts[:3]) == pytest.approx(50 * LIMIT, rel=0.05)


async def test_who_comes_late_has_no_precedence(autojump_clock: trio.testing.MockClock) -> None:
    total, first, second = TotalLimit(LIMIT), [0], [0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: sends(total, somebody(), 20, first, others=[]))
        await trio.sleep(100)
        before = first[0]
        nursery.start_soon(lambda: sends(total, somebody(), 20, second, others=[]))
        await trio.sleep(20)
        assert first[0] - before == pytest.approx(10 * LIMIT, rel=0.05)
        assert second[0] == pytest.approx(10 * LIMIT, rel=0.05)
        nursery.cancel_scope.cancel()


async def test_a_wait_that_is_given_up_lets_the_next_one_go(autojump_clock: trio.testing.MockClock) -> None:
    total, waiting = TotalLimit(LIMIT), somebody()
    total.sent(somebody(), 10 * LIMIT)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(5):
            nursery.start_soon(total.turn, waiting, 1)
            await trio.testing.wait_all_tasks_blocked()
            await total.turn(somebody(), 1)
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(5)
    assert not total._waiters
    assert total._next is None


async def test_no_limit_any_more_ends_all_waits(autojump_clock: trio.testing.MockClock) -> None:
    total = TotalLimit(1)
    total.sent(somebody(), 10_000)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(total.turn, somebody(), 1)
        await trio.sleep(10)
        total.limiter.limit = 0
    assert trio.current_time() - began == pytest.approx(10)


async def test_without_a_limit_nobody_waits_and_nothing_is_noted(mock_clock: trio.testing.MockClock) -> None:
    total, one = TotalLimit(), somebody()
    total.sent(one, 1 << 40)
    total.got(one, 1 << 40)
    assert not await total.turn(one, 1)
    assert not total._got
    assert total.limiter.granted == 1 << 40
