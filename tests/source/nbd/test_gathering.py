"""One pause for all connections of a source."""

from __future__ import annotations

import pytest
import trio

from qedfs.source.nbd.gathering import Gathering


@pytest.fixture
def gathering() -> Gathering:
    made = Gathering()
    made.seconds = 10
    return made


async def pause(gathering: Gathering, at: float, ended: list[float]) -> None:
    await trio.sleep_until(at)
    await gathering.pause()
    ended.append(trio.current_time())


async def test_who_comes_later_waits_for_the_end_of_the_same_pause(
    gathering: Gathering, autojump_clock: trio.testing.MockClock
) -> None:
    ended: list[float] = []
    async with trio.open_nursery() as nursery:
        for at in (0, 3, 9, 11):
            nursery.start_soon(pause, gathering, at, ended)
    assert ended == [10, 10, 10, 21]


async def test_none_ends_the_current_pause(gathering: Gathering, autojump_clock: trio.testing.MockClock) -> None:
    ended: list[float] = []
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(pause, gathering, 0, ended)
        await trio.sleep(2)
        gathering.seconds = 0
    assert ended == [2, 2, 2]


async def test_a_connection_that_ends_leaves_nobody_waiting(
    gathering: Gathering, autojump_clock: trio.testing.MockClock
) -> None:
    ended: list[float] = []
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(4):
            nursery.start_soon(pause, gathering, 1, ended)
            await gathering.pause()
    assert ended == [4]
    await gathering.pause()
    assert trio.current_time() == 14
