"""Writes the bytes of an image in their order, for a pipe: no seeks, zeros as bytes.

Owns the order, and how far reads are ahead of the writes. Must not know where the bytes come from.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from qedfs.errors import NoSpace
from qedfs.overlay.storage import Buffer

PIECE_BYTES = 1 << 20
AHEAD = 8  # pieces that are read at the same time, so that the round trips to a backing overlap

Read = Callable[[int, int], Awaitable[Buffer]]


class _Piece:
    def __init__(self) -> None:
        self.data = b""
        self.ready = trio.Event()


async def write_in_order(read: Read, size: int, write: Callable[[bytes], None]) -> None:
    """Read `size` bytes, AHEAD pieces at a time, and hand each to `write`, in a thread, in their order."""
    async with trio.open_nursery() as nursery:
        waiting: deque[_Piece] = deque()

        async def fetch(piece: _Piece, pos: int) -> None:
            piece.data = bytes(await read(pos, min(PIECE_BYTES, size - pos)))  # the buffer may be that of the next read
            piece.ready.set()

        async def hand_on() -> None:
            piece = waiting.popleft()
            await piece.ready.wait()
            await trio.to_thread.run_sync(write, piece.data)

        for pos in range(0, size, PIECE_BYTES):
            if len(waiting) == AHEAD:
                await hand_on()
            waiting.append(_Piece())
            nursery.start_soon(fetch, waiting[-1], pos)
        while waiting:
            await hand_on()


def write_all(fd: int, data: bytes) -> None:
    """Write to a pipe or a file. Raises BrokenPipeError if nobody reads any more, NoSpace if a file cannot grow."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NoSpace("standard output: the file system is full, or allows no larger file") from exc
            raise
