"""Limits, starts and cancels of streams over two servers. tests/mount/test_holder.py does it with real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from qedfs.mount import stream_orders
from qedfs.mount.held import HolderLink
from qedfs.mount.served import Served

from .test_inode_numbers import Values


class Stream:
    """A stream that notes its commands."""

    def __init__(self, *, limit: int = 0, enabled: bool = True, paused: bool = False) -> None:
        self.rate_limiter = SimpleNamespace(limit=limit)
        self.enabled = enabled
        self.paused = paused
        self.error = None
        self.told: list[str] = []

    def set_limit(self, limit: int) -> None:
        self.rate_limiter.limit = limit

    def cancel(self) -> None:
        self.told.append("cancel")

    def start(self) -> None:
        self.told.append("start")

    async def pause(self) -> None:
        self.told.append("pause")


def served(stream: Stream, **image: bool) -> Served:
    whole: Any = SimpleNamespace(**{"complete": False, "in_standby": False, **image})
    return Served("a", "/a.qed", 5, (0, 0, 0), whole, cast("Any", SimpleNamespace(stream=stream)))


@pytest.mark.parametrize(
    ("ordered", "made", "told"),
    [
        (Stream(limit=7, enabled=False), Stream(), ["cancel"]),
        (Stream(limit=7), Stream(enabled=False), ["start"]),
        (Stream(limit=7), Stream(enabled=False, paused=True), ["start", "pause"]),
        (Stream(limit=7), Stream(), []),
    ],
)
async def test_the_next_server_gives_the_same_orders(ordered: Stream, made: Stream, told: list[str]) -> None:
    link = Values()
    stream_orders.note(cast("HolderLink", link), served(ordered))
    await stream_orders.restore(link.values, served(made))
    assert made.rate_limiter.limit == 7
    assert made.told == told


@pytest.mark.parametrize("state", ["complete", "in_standby"])
async def test_of_an_image_without_a_stream_nothing_is_told(state: str) -> None:
    link = Values()
    stream_orders.note(cast("HolderLink", link), served(Stream(enabled=False), **{state: True}))
    assert not link.values
    made = Stream()
    await stream_orders.restore(link.values, served(made))
    assert not made.told


async def test_a_stream_stays_off_if_its_image_has_gone_back_to_standby() -> None:
    link = Values()
    stream_orders.note(cast("HolderLink", link), served(Stream(limit=7)))
    made = Stream(enabled=False)
    await stream_orders.restore(link.values, served(made, in_standby=True))
    assert (made.rate_limiter.limit, made.told) == (7, [])
