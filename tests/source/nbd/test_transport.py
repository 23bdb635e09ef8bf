"""How often a connection is received from: once per piece, or once for all that gathers meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

from qedfs.source.nbd.protocol import RequestType
from qedfs.source.nbd.reply import SIMPLE, Replies, Request
from qedfs.source.nbd.transport import PlainTransport

PIECE = b"p" * 1000
PIECES = 40
GAP_SECONDS = 0.001
MAGIC = 0x67446698


class Counting(Replies):
    """Counts the receives."""

    receives = 0

    def received(self, count: int) -> None:
        self.receives += 1
        super().received(count)


@pytest.fixture
def pair() -> Iterator[tuple[PlainTransport, socket.socket]]:
    """A transport, and the server's end. What is sent over a Unix socket has arrived, so a mock clock may jump."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield PlainTransport(ours, trio.socket.from_stdlib_socket(ours)), theirs


async def send_slowly(theirs: socket.socket) -> None:
    theirs.send(SIMPLE.pack(MAGIC, 0, 7))
    for _ in range(PIECES):
        theirs.send(PIECE)
        await trio.sleep(GAP_SECONDS)


def expecting(view: memoryview) -> Counting:
    replies = Counting(structured=False, context=None)
    replies.expect(Request(RequestType.READ, 7, 0, len(view), view, lambda: None))
    return replies


@pytest.mark.parametrize("pieces_at_once", [1, 10])
async def test_a_receive_takes_what_has_gathered(
    pair: tuple[PlainTransport, socket.socket], autojump_clock: trio.testing.MockClock, pieces_at_once: int
) -> None:
    transport, theirs = pair
    buffer = bytearray(PIECES * len(PIECE))
    replies = expecting(memoryview(buffer))
    transport.gather((pieces_at_once - 1) * GAP_SECONDS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_slowly, theirs)
        while replies.in_flight:
            await transport.receive(replies)
    assert bytes(buffer) == PIECES * PIECE
    assert PIECES / pieces_at_once <= replies.receives <= 3 + 2 * PIECES / pieces_at_once


async def test_bytes_that_somebody_waits_for_are_received_at_once(
    pair: tuple[PlainTransport, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    transport, theirs = pair
    buffer = bytearray(len(PIECE))
    replies = expecting(memoryview(buffer))
    transport.gather(3600)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.receive, replies)
        await trio.sleep(1)
        theirs.send(SIMPLE.pack(MAGIC, 0, 7) + PIECE)
        await trio.sleep(1)
        assert replies.receives == 0
        transport.gather(0)
    assert bytes(buffer) == PIECE
    assert trio.current_time() == began + 2
