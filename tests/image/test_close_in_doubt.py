"""An image that is closed while its source, which is silent, is in doubt: nobody waits for what settles it."""

from __future__ import annotations

import dataclasses

import trio

from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

CONTENT = b"s" * (8 * CLUSTER)
DEADLINE = 30.0


class Silenced(FakeSource):
    """After one read of its own it tells no ETag any more; and says nothing when it is asked about that."""

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        if self.identity.etag is None:
            await trio.sleep_forever()
        await super().read(pos, buffer, urgent=urgent)
        if pos >= 4 * CLUSTER:
            self.identity = dataclasses.replace(self.identity, etag=None)


async def test_closing_does_not_wait_for_a_silent_source(autojump_clock: trio.testing.MockClock) -> None:
    async with served(Silenced(CONTENT), deadline_seconds=DEADLINE) as image:
        assert image.version is not None
        await image.read(0, 512)
        await trio.sleep(5)
        with trio.move_on_after(1):  # a reader that is killed
            await image.read(4 * CLUSTER, 512)
        assert image.consumer._adopting == 1
        with trio.fail_after(DEADLINE / 10):
            await image.close()
