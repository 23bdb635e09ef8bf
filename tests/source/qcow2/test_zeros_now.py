"""Holes that the tables tell are answered without a flight, where nobody would keep what it brings."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from qedfs.source.base import KnowsZeros
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served
from tests.source.qcow2.build import COMPRESSED, COPIED, image
from tests.source.qcow2.support import opened, read

# Clusters of 512 bytes, 64 to a table: data in the second one, and a table that only the first 32 KiB have.
FILE = image({512: [COPIED | 1024, 0], 1024: [0, COPIED | 2048, 1, COMPRESSED | 4096]}, {2048: b"d" * 512})


async def test_what_is_known() -> None:
    source, inner = await opened(FILE)
    assert isinstance(source, KnowsZeros)
    assert source.zeros_now(32 << 10, 32 << 10)  # the table of tables tells
    assert not source.zeros_now(0, 512)  # it has not been looked at
    await read(source, 0, 512)
    inner.reads.clear()
    for pos, size, zeros in [
        *((0, 512, True), (100, 412, True), (0, 513, False), (511, 2, False), (512, 512, False), (1024, 512, True)),
        *((1024, 513, False), (2048, 62 << 10, True), (2000, 100, False), (1536, 1, False), (63 << 10, 1 << 10, True)),
        *((0, 0, False), (63 << 10, 1025, False)),
    ]:
        assert source.zeros_now(pos, size) is zeros, (pos, size)
    assert not inner.reads
    await source.aclose()
    assert not source.zeros_now(0, 512)


async def test_it_agrees_with_what_is_read() -> None:
    source, _ = await opened(image({512: [1024, 1536], 1024: [0, 2048, 1], 1536: [0] * 8 + [2048]}, {2048: b"d" * 512}))
    whole = await read(source, 0, 64 << 10)
    numbers = random.Random(4)
    for _ in range(2000):
        pos = numbers.randrange(64 << 10)
        size = numbers.randint(1, (64 << 10) - pos)
        assert source.zeros_now(pos, size) is not any(whole[pos : pos + size])


class Knowing(FakeSource):
    def zeros_now(self, pos: int, size: int) -> bool:
        return not any(self.content[pos : pos + size])


@pytest.mark.parametrize("copy_on_read", [False, True])
async def test_a_hole_costs_no_request(autojump_clock: trio.testing.MockClock, copy_on_read: bool) -> None:
    source = Knowing(b"d" * CLUSTER + bytes(3 * CLUSTER))
    async with served(source, copy_on_read=copy_on_read) as image_:
        assert await image_.read(0, 4 * CLUSTER) == source.content
        await trio.sleep(1)
        source.reads.clear()
        assert await image_.read(2 * CLUSTER - 7, CLUSTER) == bytes(CLUSTER)
        assert not source.reads
        # What is to be kept has been brought, and has become entries.
        assert image_.counters.kept == (4 * CLUSTER if copy_on_read else 0)
