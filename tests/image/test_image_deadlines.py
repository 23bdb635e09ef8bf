"""One request has one deadline, however many steps it takes."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import Reason, SourceUnreachable
from qedfs.image.condition import Cause
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

DEADLINE = 30.0
CONTENT = b"s" * (16 * CLUSTER)


class Halting(FakeSource):
    """Every read takes a while, and those from `halts_at` on for ever."""

    takes = 0.0
    halts_at = len(CONTENT)

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        await trio.sleep(self.takes)
        if pos >= self.halts_at:
            await trio.sleep_forever()
        await super().read(pos, buffer, urgent=urgent)


async def test_connecting_and_asking_share_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    source = Halting(CONTENT, round_trip=DEADLINE - 5)
    source.halts_at = 0
    async with served(source, deadline_seconds=DEADLINE) as image:
        began = trio.current_time()
        with pytest.raises(SourceUnreachable, match="gave no answer within 30 s") as caught:
            await image.read(0, 512)
        assert caught.value.reason is Reason.TIMEOUT
        assert trio.current_time() - began < DEADLINE + 2
        assert str(image.condition.first(Cause.FETCH_FAILED)) == str(caught.value)
        assert image.fetch is not None
        assert image.fetch.readers == 0


async def test_both_ends_of_a_write_are_asked_for_at_once(autojump_clock: trio.testing.MockClock) -> None:
    source = Halting(CONTENT)
    async with served(source, deadline_seconds=DEADLINE) as image:
        await image.source_size()
        source.takes = DEADLINE - 1
        began = trio.current_time()
        await image.write(2 * CLUSTER + 512, b"g" * (3 * CLUSTER))
        assert trio.current_time() - began < DEADLINE
        assert sorted(pos for pos, _, _ in source.reads) == [2 * CLUSTER, 5 * CLUSTER]
        source.takes = 0
        start, end = 2 * CLUSTER + 512, 5 * CLUSTER + 512
        assert await image.read(0, len(CONTENT)) == CONTENT[:start] + b"g" * (3 * CLUSTER) + CONTENT[end:]


@pytest.mark.parametrize("halts_at", [2, 5])
async def test_the_end_that_does_not_come_fails_the_write(
    autojump_clock: trio.testing.MockClock, halts_at: int
) -> None:
    source = Halting(CONTENT)
    async with served(source, deadline_seconds=DEADLINE) as image:
        await image.source_size()
        source.takes, source.halts_at = DEADLINE - 1, halts_at * CLUSTER
        began = trio.current_time()
        with pytest.raises(SourceUnreachable):
            await image.write(2 * CLUSTER + 512, b"g" * (3 * CLUSTER))
        assert trio.current_time() - began < DEADLINE + 2
        source.takes, source.halts_at = 0, len(CONTENT)
        await trio.sleep(1)
        assert await image.read(0, len(CONTENT)) == CONTENT
