"""While something waits for a source, one small request at a time asks whether it is back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.fetch.comeback import Comeback
from qedfs.source.retrying import RetryingSource
from tests.fakes.source import FakeSource, remote

HOUR = 3600.0


class Watched:
    def __init__(self, source: FakeSource, nursery: trio.Nursery) -> None:
        self.remote: RetryingSource = remote(source)
        self.comeback = Comeback(self.remote, nursery)
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


async def run(source: FakeSource, use: Callable[[Watched], object], *, waiters: int = 1) -> Watched:
    """Waiters of a source that is away for an hour; `use` then changes something, and ten seconds pass."""
    async with trio.open_nursery() as nursery:
        watched = Watched(source, nursery)
        with ExitStack() as stack:
            for _ in range(waiters):
                stack.enter_context(watched.comeback.awaited(watched.wake))
            await trio.sleep(HOUR)
            assert watched.woken == 0
            use(watched)
            await trio.sleep(10)
        nursery.cancel_scope.cancel()
    return watched


def answers_again(watched: Watched) -> None:
    watched.remote._source.fail = None  # type: ignore[union-attr]


@pytest.mark.parametrize("waiters", [1, 1000])
async def test_all_are_woken_when_the_source_answers(autojump_clock: trio.testing.MockClock, waiters: int) -> None:
    source = FakeSource(b"x" * 4096)
    source.fail = SourceUnreachable("away")
    watched = await run(source, answers_again, waiters=waiters)
    assert watched.woken >= 1
    # However many wait: a request each few seconds, of a byte.
    assert HOUR / 40 < len(source.reads) < HOUR / 2
    assert {size for _, size, _ in source.reads} == {1}


async def test_a_server_without_its_file_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"x" * 4096)
    source.fail = SourceError("has no such file (404)")
    assert (await run(source, answers_again)).woken >= 1


async def test_another_version_wakes_them_too(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"x" * 4096)
    source.fail = SourceUnreachable("away")

    def changes(_: Watched) -> None:
        source.fail = SourceChanged("another version")

    assert (await run(source, changes)).woken >= 1


async def test_nobody_is_asked_for_when_nothing_waits(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"x" * 4096)
    source.fail = SourceUnreachable("away")
    async with trio.open_nursery() as nursery:
        watched = Watched(source, nursery)
        with watched.comeback.awaited(watched.wake):
            await trio.sleep(60)
        asked = len(source.reads)
        await trio.sleep(HOUR)
        assert len(source.reads) == asked
        # The next one begins anew, also at once after the last.
        with watched.comeback.awaited(watched.wake):
            pass
        with watched.comeback.awaited(watched.wake):
            await trio.sleep(60)
        assert len(source.reads) > asked
        nursery.cancel_scope.cancel()
