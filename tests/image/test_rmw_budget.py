"""The memory of partial writes: bounded for an image, taken once by a write, and waited for in turn."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from qedfs.image.rmw_budget import MOST_BYTES, RmwBudget, RmwReservation

CLUSTER = MOST_BYTES // 4  # two writes fill the budget


async def test_a_write_takes_its_memory_once() -> None:
    budget = RmwBudget(CLUSTER)
    first, second, third = (RmwReservation(budget) for _ in range(3))
    for _ in range(2):  # for the cluster at each end
        assert first.take_now()
    assert second.take_now()
    assert not third.take_now()
    second.give_back()
    assert third.take_now()


async def test_both_ends_of_a_write_wait_for_one_reservation() -> None:
    budget = RmwBudget(CLUSTER)
    held = [RmwReservation(budget) for _ in range(2)]
    assert all(each.take_now() for each in held)
    late, got = RmwReservation(budget), 0

    async def one_end() -> None:
        nonlocal got
        await late.take()
        got += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_end)
        nursery.start_soon(one_end)
        await wait_all_tasks_blocked()
        assert got == 0
        held[0].give_back()
    assert got == 2
    assert not RmwReservation(budget).take_now()
    late.give_back()
    assert RmwReservation(budget).take_now()


async def test_one_write_is_always_let_in_however_large_its_clusters() -> None:
    assert RmwReservation(RmwBudget(MOST_BYTES)).take_now()


async def test_a_write_that_took_nothing_gives_nothing_back() -> None:
    budget = RmwBudget(CLUSTER)
    RmwReservation(budget).give_back()
    assert [RmwReservation(budget).take_now() for _ in range(3)] == [True, True, False]
