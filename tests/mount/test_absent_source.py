"""Many readers and a source that is away: all of them learn it within one deadline, and the hold of a dead source."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qedfs.errors import SourceUnreachable
from qedfs.source.base import Source
from qedfs.source.circuit_breaker import HOLD_DEADLINES
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

DEADLINE_SECONDS = 2.0


async def _refused() -> Source:
    raise SourceUnreachable("http://fake/disk.raw: connection refused")


async def test_readers_do_not_wait_for_each_others_deadlines(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(bytes(CLUSTER)), deadline_seconds=DEADLINE_SECONDS) as image:
        assert image.fetch is not None
        image.fetch.remote._opener = _refused
        waited = []

        async def read() -> None:
            begun = trio.current_time()
            with pytest.raises(SourceUnreachable):
                await image.read(0, 512)
            waited.append(trio.current_time() - begun)

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(read)
        assert len(waited) == 50
        assert max(waited) < (1.1 + HOLD_DEADLINES) * DEADLINE_SECONDS  # on a mock clock


async def test_a_killed_reader_does_not_end_the_look_at_the_source(autojump_clock: trio.testing.MockClock) -> None:
    content = b"c" * CLUSTER
    source = FakeSource(content)
    async with served(source) as image:
        with trio.move_on_after(source.round_trip / 2) as killed:
            await image.read(0, 512)
        assert killed.cancelled_caught
        with trio.fail_after(3 * source.round_trip):
            assert bytes(await image.read(0, 512)) == content[:512]
