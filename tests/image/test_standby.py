"""What an image in standby reads: the source as it is at that moment, whoever else reads the same."""

from __future__ import annotations

import random

import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.image.standby import DEADLINE_SECONDS, PassThrough
from qedfs.source.base import Identity
from qedfs.source.qed import QedSource
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.fakes.source import FakeSource, remote
from tests.source.qed import support as qed

CONTENT = random.Random(5).randbytes(1 << 20)


def passing(source: FakeSource) -> tuple[PassThrough, list[RetryingSource]]:
    """A pass-through to `source`, and the sources that it has released."""
    released: list[RetryingSource] = []
    return PassThrough(lambda: remote(source, deadline_seconds=DEADLINE_SECONDS), released.append), released


async def read(through: PassThrough, pos: int, size: int) -> bytes:
    buffer = bytearray(b"\xee" * size)
    await through.read([(pos, memoryview(buffer))])
    return bytes(buffer)


async def test_each_reader_asks_the_source(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    through, _ = passing(source)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(read, through, 4096, 512)
    assert source.reads == [(4096, 512, True)] * 5


async def test_past_the_end_of_the_source_there_are_zeros(autojump_clock: trio.testing.MockClock) -> None:
    through, _ = passing(FakeSource(CONTENT[:1000]))
    assert await read(through, 0, 2000) == CONTENT[:1000] + bytes(1000)
    assert await read(through, 5000, 10) == bytes(10)


async def test_a_source_that_is_not_there_costs_one_short_error(autojump_clock: trio.testing.MockClock) -> None:
    async def refuse() -> FakeSource:
        raise SourceUnreachable("refused")

    location = parse_location("http://fake/disk.raw")
    made = RetryingSource(location, refuse, deadline_seconds=DEADLINE_SECONDS)
    through = PassThrough(lambda: made, lambda _: None)
    for _ in range(5):
        began = trio.current_time()
        with pytest.raises(SourceUnreachable, match="refused"):
            await read(through, 0, 512)
        assert trio.current_time() - began <= 1.1 * DEADLINE_SECONDS


async def test_a_source_that_comes_is_read_at_once(autojump_clock: trio.testing.MockClock) -> None:
    source, there = FakeSource(CONTENT), False

    async def connect() -> FakeSource:
        if not there:
            raise SourceUnreachable("refused")
        return source

    made = RetryingSource(parse_location("http://fake/disk.raw"), connect, deadline_seconds=DEADLINE_SECONDS)
    through = PassThrough(lambda: made, lambda _: None)
    with pytest.raises(SourceUnreachable):
        await read(through, 0, 512)
    there = True
    await trio.sleep(5)
    assert await read(through, 0, 512) == CONTENT[:512]


async def test_another_version_after_a_reconnect_is_read_and_no_error(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    through, released = passing(source)
    first = through.remote
    assert await read(through, 0, 512) == CONTENT[:512]
    source.is_closed = True  # the server has restarted, with a disk of another size
    source.content = CONTENT[::-1][: 1 << 19]
    source.identity = Identity(1 << 19, '"v2"')
    first._source = None
    assert await read(through, 0, 512) == source.content[:512]
    assert released == [first]


async def test_the_tables_of_a_disk_image_are_read_anew_each_time(autojump_clock: trio.testing.MockClock) -> None:
    cluster = qed.CLUSTER
    clusters = {qed.DATA: b"d" * cluster}
    file = FakeSource(qed.image({qed.L1: [qed.L2], qed.L2: [0]}, clusters))
    released: list[RetryingSource] = []

    async def connect() -> QedSource:
        file.is_closed = False
        return await QedSource.open(file, "disk.qed")

    def make() -> RetryingSource:
        return RetryingSource(parse_location("nbd://fake"), connect, deadline_seconds=DEADLINE_SECONDS)

    through = PassThrough(make, released.append)
    assert await read(through, 0, 2 * cluster) == bytes(2 * cluster)
    file.content = qed.image({qed.L1: [qed.L2], qed.L2: [0, qed.DATA]}, clusters)  # another program has written
    assert await read(through, 0, 2 * cluster) == bytes(cluster) + clusters[qed.DATA]
    assert len(released) == 2
    assert through.remote not in released
