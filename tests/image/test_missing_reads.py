"""Reads of missing bytes: which source they ask, and whose error they get. More is in `test_exchange.py`."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import SourceError, SourceUnreachable
from qedfs.image.standby import PassThrough
from qedfs.image.write_gate import WriteGate, Writes
from tests.fakes.source import FakeSource, remote
from tests.served import CLUSTER, served

CONTENT = b"now" * CLUSTER


async def test_in_standby_nothing_is_kept_and_nothing_is_known(autojump_clock: trio.testing.MockClock) -> None:
    old, source = FakeSource(CONTENT), FakeSource(CONTENT)
    async with served(old) as image:
        assert image.fetch is not None
        image.gate = WriteGate("disk.raw", Writes.REFUSE)
        image.exchange_source(None, standby=PassThrough(lambda: remote(source), lambda _: None))
        for number in range(3):
            assert bytes(await image.read(CLUSTER, 4096)) == CONTENT[CLUSTER : CLUSTER + 4096]
            assert source.reads == [(CLUSTER, 4096, True)] * (number + 1)
        assert image.overlay.all_missing(0, 3)
        assert (image.waits.ranges, image.overlay.record.pin) == ([], None)


async def test_a_read_that_is_given_up_is_not_run_again(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.gate = trio.Event()
    async with served(source) as image, trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(SourceUnreachable, match="nobody waits"):
                await image.read(0, 4096)

        nursery.start_soon(read)
        await trio.sleep(1)
        image.give_up(since=trio.current_time())
        await trio.sleep(1)
        source.gate.set()


async def test_an_error_is_noted_once_and_raised(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(CONTENT)
    source.fail = SourceError("broken")
    async with served(source) as image:
        with pytest.raises(SourceError, match="broken"):
            await image.read(0, 4096)
        assert image.failures
        assert image.condition.worst is not None
