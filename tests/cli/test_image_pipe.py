"""An image in the order of its bytes: several reads at a time, one write, and no read that nobody waits for."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from qedfs.cli.image_pipe import AHEAD, PIECE_BYTES, write_all, write_in_order
from qedfs.errors import NoSpace, SourceError


async def test_the_order_of_the_reads_does_not_matter(autojump_clock: trio.testing.MockClock) -> None:
    size = 20 * PIECE_BYTES + 5
    chosen, under_way, most = random.Random(1), 0, 0
    written: list[bytes] = []

    async def read(pos: int, length: int) -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await trio.sleep(chosen.random())
        under_way -= 1
        return (pos // PIECE_BYTES).to_bytes(1, "big") * length

    await write_in_order(read, size, written.append)
    assert [piece[0] for piece in written] == list(range(21))
    assert sum(map(len, written)) == size
    assert most == AHEAD


async def test_an_error_of_a_read_ends_it() -> None:
    async def read(pos: int, length: int) -> bytes:
        if pos:
            raise SourceError("gone")
        return bytes(length)

    with pytest.raises(ExceptionGroup) as failed:
        await write_in_order(read, 9 * PIECE_BYTES, lambda _: None)
    assert failed.group_contains(SourceError)


def test_a_full_disk_and_a_pipe_that_nobody_reads() -> None:
    with Path("/dev/full").open("wb") as full, pytest.raises(NoSpace, match="standard output"):
        write_all(full.fileno(), b"data")
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        write_all(writer, b"data")
    os.close(writer)
