"""Another address of a source is compared with what is known of the old one."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from qedfs.errors import SourceChanged, SourceError, SourceUnreachable
from qedfs.format.record import digest
from qedfs.image.known_blocks import compared, is_raw, keeps_nothing, known_blocks
from tests.fakes.source import FakeSource, remote
from tests.served import CLUSTER, served

CONTENT = random.Random(4).randbytes(40 * CLUSTER)
URL = "http://new/disk.raw"


async def test_the_same_disk_elsewhere(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    async with served(source) as image:
        for pos in range(0, 20 * CLUSTER, CLUSTER):
            await image.read(pos, 512)
        assert len(known_blocks(image)) > 10
        assert is_raw(image)
        source.fail = SourceUnreachable("gone")
        pin = await compared(image, URL, remote(FakeSource(CONTENT, etag='"other"')), force=False)
        assert (pin.backing, pin.size, pin.etag) == (digest(URL), len(CONTENT), '"other"')
        assert pin.samples


@pytest.mark.parametrize("at", [0, 7 * CLUSTER, 19 * CLUSTER])
async def test_another_disk_of_that_size(autojump_clock: trio.testing.MockClock, at: int) -> None:
    other = CONTENT[:at] + bytes(4096) + CONTENT[at + 4096 :]
    async with served(FakeSource(CONTENT)) as image:
        for pos in range(0, 20 * CLUSTER, CLUSTER):
            await image.read(pos, 512)
        for force in (False, True):
            with pytest.raises(SourceChanged, match=f"the bytes at {at} differ"):
                await compared(image, URL, remote(FakeSource(other)), force=force)
        with pytest.raises(SourceChanged, match="has 4096 bytes"):
            await compared(image, URL, remote(FakeSource(bytes(4096))), force=True)


async def test_what_a_guest_wrote_is_not_compared(autojump_clock: trio.testing.MockClock) -> None:
    async with served(FakeSource(CONTENT)) as image:
        await image.read(0, 512)
        await image.write(0, b"g" * len(CONTENT))
        await compared(image, URL, remote(FakeSource(CONTENT)), force=False)


async def test_nothing_to_compare(autojump_clock: trio.testing.MockClock) -> None:
    zeros = bytes(len(CONTENT))
    async with served(FakeSource(zeros)) as image:
        assert await keeps_nothing(image)
        await compared(image, URL, remote(FakeSource(zeros)), force=False)
        await image.read(0, CLUSTER)
        await trio.sleep(1)
        assert not await keeps_nothing(image)
        with pytest.raises(SourceError, match="--force if it is the right disk"):
            await compared(image, URL, remote(FakeSource(zeros)), force=False)
        await compared(image, URL, remote(FakeSource(zeros)), force=True)
