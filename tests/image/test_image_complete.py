"""Requests that are under way while the stream comes to its end: the source may be gone before they get their bytes."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.jobs.job import Driver, Job
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import served

SIZE = 4 << 20
DATA = b"d" * 4096


def with_a_hole() -> FakeSource:
    """Data at the start, then a hole; with clusters of 4 KiB, whole tables lie in it, which the stream passes over."""
    source = FakeSource(DATA + bytes(SIZE - len(DATA)))
    source.holes = [(len(DATA), SIZE - len(DATA))]
    return source


@pytest.mark.parametrize("error", [SourceError("404"), SourceUnreachable("refused"), SourceChanged("another version")])
async def test_a_request_under_way_outlives_the_source(
    autojump_clock: trio.testing.MockClock, error: SourceError
) -> None:
    source = with_a_hole()
    pos = SIZE - 8192
    async with served(source, cluster_size=4096, deadline_seconds=2) as image, trio.open_nursery() as nursery:

        async def read() -> None:
            assert await image.read(pos - 4096, 8192) == bytes(8192)

        async def write() -> None:
            await image.write(pos + 5000, b"guest")

        class WaitsForRequests(Driver):
            async def may_finish(self, job: Job) -> bool:
                source.gate = trio.Event()
                nursery.start_soon(read)
                nursery.start_soon(write)
                await trio.testing.wait_all_tasks_blocked()
                return True

        await StreamJob(image, driver=WaitsForRequests()).run()
        assert image.complete
        assert source.gate is not None
        source.fail = error
        source.gate.set()
        await trio.sleep(10)
        expected = DATA + bytes(pos + 5000 - len(DATA)) + b"guest" + bytes(8192 - 5005)
        assert await image.read(0, SIZE) == expected
