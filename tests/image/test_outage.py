"""A source that gives no answer is told of after two seconds, and until its next answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from qedfs.errors import SourceError, SourceUnreachable
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.image.outage import look_at_source
from qedfs.jobs.stream import StreamJob
from qedfs.source.circuit_breaker import AWAY_SECONDS
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = b"c" * (64 * CLUSTER)


@asynccontextmanager
async def looked_at(source: FakeSource) -> AsyncIterator[tuple[Image, list[bool]]]:
    """An image that is looked at once a second, and what the looks have found."""
    found: list[bool] = []
    async with served(source) as image, trio.open_nursery() as nursery:

        async def look() -> None:
            while True:
                await trio.sleep(1)
                look_at_source(image)
                found.append(image.condition.noted(Cause.SOURCE_AWAY) is not None)

        nursery.start_soon(look)
        yield image, found
        nursery.cancel_scope.cancel()


async def test_an_outage_is_noted_once_and_lasts_until_an_answer(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with looked_at(source) as (image, found), trio.open_nursery() as nursery:
        await image.read(0, 512)
        await trio.sleep(100)
        assert not any(found)  # nobody asks
        source.fail = SourceUnreachable("backing http://fake/disk.raw: connection refused")
        stream = StreamJob(image)
        nursery.start_soon(stream.run)
        found.clear()
        await trio.sleep(600)
        # Although the stream pauses between its attempts, in which nobody asks.
        assert found.index(True) <= AWAY_SECONDS + 1
        assert all(found[found.index(True) :])
        trouble = image.condition.worst
        assert trouble is not None
        assert (trouble.cause, trouble.ends_with) == (Cause.SOURCE_AWAY, "the next answer of the source")
        assert str(trouble.error).startswith("source away since ")
        assert str(trouble.error).endswith(": no answer from http://fake/disk.raw: connection refused")
        source.fail = None
        await trio.sleep(60)
        assert image.complete
        assert image.condition.worst is None


async def test_a_slow_source_is_not_away(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT, round_trip=1.0)
    async with looked_at(source) as (image, found):
        await StreamJob(image).run()
        assert not any(found)


async def test_an_answer_that_is_an_error_is_an_answer(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.fail = SourceError("http://fake/disk.raw: 404")
    async with looked_at(source) as (image, found):
        for _ in range(5):
            with pytest.raises(SourceError):
                await image.read(0, 512)
            await trio.sleep(1)
        assert not any(found)
