"""A flight: who waits for it gets its bytes or its error, and what was sent beside it is called off."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qedfs.errors import SourceUnreachable
from qedfs.fetch.flight import Flight


def flight(size: int = 8) -> Flight:
    return Flight(1, 100, size, bytearray(range(size)), since=0.0, urgent=False)


async def test_waiters_get_their_part(autojump_clock: trio.testing.MockClock) -> None:
    carried, view = flight(), bytearray(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(carried.copy_to, 102, memoryview(view))
        await trio.testing.wait_all_tasks_blocked()
        assert not any(view)
        carried.arrive()
    assert view == b"\2\3\4"


async def test_each_waiter_gets_an_error_of_its_own() -> None:
    carried = flight()
    carried.error = SourceUnreachable("away")
    carried.arrive()
    for _ in range(2):
        with pytest.raises(SourceUnreachable, match="away") as caught:
            await carried.copy_to(100, memoryview(bytearray(1)))
        assert caught.value is not carried.error


@pytest.mark.parametrize("failed", [False, True])
async def test_rivals_are_called_off_by_a_flight_with_bytes_only(failed: bool) -> None:
    carried, rival = flight(), trio.CancelScope()
    carried.rivals.append(rival)
    carried.error = SourceUnreachable("away") if failed else None
    carried.arrive()
    assert rival.cancel_called is not failed


async def test_a_wait_ends_with_its_moment(autojump_clock: trio.testing.MockClock) -> None:
    carried = flight()
    assert not await carried.arrives(trio.current_time() + 5)
    carried.arrive()
    assert await carried.arrives(trio.current_time() - 1)
