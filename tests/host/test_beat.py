"""The beat: tasks that begin at different moments wake up together from then on."""

from __future__ import annotations

import trio
import trio.testing

from qedfs.host.beat import next_beat


async def test_tasks_wake_up_at_the_same_moments(autojump_clock: trio.testing.MockClock) -> None:
    moments: list[float] = []

    async def recur(after: float, seconds: float) -> None:
        await trio.sleep(after)
        while True:
            await next_beat(seconds)
            moments.append(trio.current_time())

    with trio.move_on_after(3.25):
        async with trio.open_nursery() as nursery:
            for after, seconds in ((0.0, 1.0), (0.3, 1.0), (0.7, 0.5)):
                nursery.start_soon(recur, after, seconds)
    assert sorted(moments) == [1.0] * 3 + [1.5] + [2.0] * 3 + [2.5] + [3.0] * 3
