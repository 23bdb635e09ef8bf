"""How often a connection is received from: once per piece, or once for all that gathers meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import trio

from qedfs.source.nbd.gathering import Gathering
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
def gathering() -> Gathering:
    return Gathering()


@pytest.fixture
def pairs(gathering: Gathering) -> Iterator[list[tuple[PlainTransport, socket.socket]]]:
    """Two transports of a source, each with the server's end.

    What is sent over a Unix socket has arrived, so a mock clock may jump.
    """
    with ExitStack() as stack:
        ends = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(2)]
        yield [(PlainTransport(ours, trio.socket.from_stdlib_socket(ours), gathering), theirs) for ours, theirs in ends]


@pytest.fixture
def pair(pairs: list[tuple[PlainTransport, socket.socket]]) -> tuple[PlainTransport, socket.socket]:
    return pairs[0]


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
    pair: tuple[PlainTransport, socket.socket],
    gathering: Gathering,
    autojump_clock: trio.testing.MockClock,
    pieces_at_once: int,
) -> None:
    transport, theirs = pair
    buffer = bytearray(PIECES * len(PIECE))
    replies = expecting(memoryview(buffer))
    gathering.seconds = (pieces_at_once - 1) * GAP_SECONDS
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_slowly, theirs)
        while replies.in_flight:
            await transport.receive(replies)
    assert bytes(buffer) == PIECES * PIECE
    assert PIECES / pieces_at_once <= replies.receives <= 3 + 2 * PIECES / pieces_at_once


async def test_bytes_that_somebody_waits_for_are_received_at_once(
    pairs: list[tuple[PlainTransport, socket.socket]], gathering: Gathering, autojump_clock: trio.testing.MockClock
) -> None:
    buffers = [bytearray(len(PIECE)) for _ in pairs]
    replies = [expecting(memoryview(buffer)) for buffer in buffers]
    gathering.seconds = 3600
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for (transport, _), each in zip(pairs, replies, strict=True):
            nursery.start_soon(transport.receive, each)
        await trio.sleep(1)
        for _, theirs in pairs:
            theirs.send(SIMPLE.pack(MAGIC, 0, 7) + PIECE)
        await trio.sleep(1)
        assert [each.receives for each in replies] == [0, 0]
        gathering.seconds = 0
    assert buffers == [PIECE, PIECE]
    assert trio.current_time() == began + 2
