"""Read-ahead that nobody needs any more, or that fails: it costs nobody anything."""

from __future__ import annotations

import pytest
import trio

from qedfs.fetch import budget
from qedfs.image import fetch_ahead
from qedfs.image.fetch_ahead import FetchAhead
from qedfs.image.image import Image
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

# 4 KiB clusters: a table spans 2 MiB, so that the hole has whole tables, which stay missing when the image is complete.
CONTENT = b"a" * CLUSTER + bytes(8 << 20)
HOLE = (4 << 20, 4 << 20)
STEP = 256 << 10


@pytest.fixture
def source() -> FakeSource:
    source = FakeSource(CONTENT)
    source.holes = [(CLUSTER, 8 << 20)]
    return source


async def test_it_asks_nothing_once_the_image_is_complete(
    source: FakeSource, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(source, cluster_size=4096) as image:
        await StreamJob(image).run()
        assert image.complete
        asked = len(source.reads)
        await FetchAhead(image).load_and_start(*HOLE)  # begun before that, while the map was not loaded
        assert image.fetch is not None
        assert image.fetch.flights() == []
        assert len(source.reads) == asked


async def test_a_request_that_the_end_of_the_stream_has_overtaken_is_no_failure(
    source: FakeSource, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(source, cluster_size=4096) as image:
        job = StreamJob(image)
        await job.run()
        assert image.fetch is not None
        image.fetch.start(HOLE[0] // 4096, 4, consumer=image.consumer)
        await image.fetch.remote.aclose()
        await trio.sleep(60)
        assert (image.condition.worst, image.failures) == (None, 0)


async def test_a_fault_of_ours_ends_nothing_else(
    source: FakeSource,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("a fault")

    async with served(source, cluster_size=4096) as image:
        monkeypatch.setattr(image.overlay, "map", broken)
        await begin_ahead(image)
        assert "a fault" in caplog.text


async def test_what_there_is_no_room_for_is_fetched_later(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MOST_HELD_BYTES", 4 << 20)
    monkeypatch.setattr(fetch_ahead, "AHEAD_UNKNOWN_BYTES", 24 << 20)
    source = FakeSource(bytes(b"a" * (32 << 20)))
    async with served(source) as image:
        for pos in range(0, image.size, STEP):
            assert await image.read(pos, STEP) == b"a" * STEP
            await trio.sleep(0.01)
    # Some, before it is seen that the reader goes straight ahead.
    assert sum(size for _, size, urgent in source.reads if urgent) < 4 << 20


async def begin_ahead(image: Image) -> None:
    assert image.fetch is not None
    image.fetch.nursery.start_soon(FetchAhead(image).load_and_start, *HOLE)
    await trio.sleep(1)
