"""Readers for whom there is no flight, at a source that has been away."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.source.circuit_breaker import MOST_HOLD_SECONDS, PROBE_SECONDS
from tests.fakes.source import FakeSource
from tests.served import served

LARGE = 8 << 20  # bytes of a cluster, of which a reader gets what it asks for only
DEADLINE = 30.0
TRIES = 20


async def test_a_source_that_is_back_and_slow_is_found_alive(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"s" * LARGE)
    async with served(source, cluster_size=LARGE, deadline_seconds=DEADLINE) as image:
        await image.read(0, 512)
        source.gate = trio.Event()
        with pytest.raises(SourceUnreachable):
            await image.read(4096, 512)
        source.gate.set()
        source.round_trip = 2 * MOST_HOLD_SECONDS  # well within the deadline
        for _ in range(TRIES):
            try:
                assert bytes(await image.read(4096, 512)) == b"s" * 512
                break
            except SourceUnreachable:
                await trio.sleep(PROBE_SECONDS)
        else:
            pytest.fail("nobody has noticed that it answers")
