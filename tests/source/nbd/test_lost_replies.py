"""A server that loses replies: their requests fail, and nothing else. The clock is a mock."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qedfs.errors import Reason, SourceUnreachable
from qedfs.source.nbd import NbdSource
from qedfs.source.nbd.connection import STALL_SECONDS
from tests.fakes.nbd_server import READ, Behaviour, Call, FakeNbd, data_chunk
from tests.source.nbd.support import MiB, opened, read, serving_on_mock_clock, sparse_content

CONTENT = sparse_content(MiB)


class Losing(FakeNbd):
    """Answers no read of the first 4 KiB; with `late`, it answers them when a read of the last byte has come."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__(CONTENT, Behaviour(read=self._reply))
        self._late = late
        self.lost: list[Call] = []

    def _reply(self, call: Call) -> bytes:
        if call.pos < 4096:
            self.lost.append(call)
            return b""
        late = self.lost if self._late and call.pos == len(CONTENT) - 1 else []
        return b"".join(data_chunk(each.cookie, each.pos, each.data) for each in (*late, call))


async def others(source: NbdSource, seconds: float) -> None:
    """Reads that are answered, one after the other."""
    with trio.move_on_after(seconds):
        while True:
            assert await read(source, 8192, 512) == CONTENT[8192:8704]
            await trio.sleep(STALL_SECONDS / 20)


@pytest.mark.parametrize("late", [False, True])
async def test_its_request_fails_and_the_connection_stays(
    autojump_clock: trio.testing.MockClock, *, late: bool
) -> None:
    fake = Losing(late=late)
    async with serving_on_mock_clock(fake) as url, opened(url) as source, trio.open_nursery() as nursery:
        nursery.start_soon(others, source, 5 * STALL_SECONDS)
        began = trio.current_time()
        with pytest.raises(SourceUnreachable, match="a reply got lost") as caught:
            await read(source, 0, 4096)
        assert caught.value.reason is Reason.TIMEOUT
        assert STALL_SECONDS <= trio.current_time() - began < 5 * STALL_SECONDS
        assert await read(source, len(CONTENT) - 1, 1) == CONTENT[-1:]
        assert await read(source, 4096, 4096) == CONTENT[4096:8192]
        assert fake.connections == 1


async def test_one_that_waits_for_its_turn_is_not_lost(autojump_clock: trio.testing.MockClock) -> None:
    """Later requests are answered first, but not many of them."""
    fake = Losing(late=True)
    async with serving_on_mock_clock(fake) as url, opened(url) as source, trio.open_nursery() as nursery:

        async def first() -> None:
            assert await read(source, 0, 4096) == CONTENT[:4096]

        nursery.start_soon(first)
        for _ in range(6):
            await trio.sleep(STALL_SECONDS / 2)
            await read(source, 8192, 512)
        await read(source, len(CONTENT) - 1, 1)
    assert sum(call.command == READ for call in fake.calls) == 8
