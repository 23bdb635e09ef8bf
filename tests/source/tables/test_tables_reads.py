"""Pieces of a buffer, and the reads of the file that bring them."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from qedfs.errors import SourceUnreachable
from qedfs.source.tables.reads import (
    CONCURRENT_READS,
    MAX_GAP_BYTES,
    MAX_JOINED_BYTES,
    Batch,
    Data,
    Zeros,
    add_data,
    add_zeros,
    join,
    part,
    read_batch,
    run_all,
)
from tests.source.qcow2.support import MemorySource


def spans(*pieces: tuple[int, int]) -> list[tuple[int, int, int]]:
    return [(batch.offset, batch.size, len(batch.pieces)) for batch in join(Data(0, *piece) for piece in pieces)]


def test_neighbours_become_one_piece() -> None:
    zeros: list[Zeros] = []
    data: list[Data] = []
    for at, size in ((0, 10), (10, 5), (16, 1)):
        add_zeros(zeros, at, size)
    assert zeros == [Zeros(0, 15), Zeros(16, 1)]
    for at, offset, size in ((0, 100, 10), (10, 110, 5), (15, 200, 5), (21, 205, 1)):
        add_data(data, at, offset, size)
    assert data == [Data(0, 100, 15), Data(15, 200, 5), Data(21, 205, 1)]


def test_neighbours_in_the_file_that_are_none_on_the_disk() -> None:
    assert spans((1536, 512), (1024, 512), (2048, 512)) == [(1024, 1536, 3)]


async def test_a_piece_is_what_its_batch_has_of_it() -> None:
    pieces = [Data(0, 12, 3), Data(3, 10, 2)]
    (batch,) = join(pieces)
    assert batch == Batch(10, 5, [pieces[1], pieces[0]])
    data = await read_batch(MemorySource(bytes(range(20))), batch, urgent=True)
    assert bytes(part(data, batch, pieces[0])) == bytes([12, 13, 14])
    assert bytes(part(data, batch, pieces[1])) == bytes([10, 11])


async def test_a_few_jobs_at_a_time_and_the_first_error_ends_all() -> None:
    running, most, ended = 0, 0, 0

    async def job(number: int) -> None:
        nonlocal running, most, ended
        running += 1
        most = max(most, running)
        await trio.lowlevel.checkpoint()
        running -= 1
        if number == 30:
            raise SourceUnreachable("away")
        ended += 1

    await run_all([])
    await run_all([partial(job, number) for number in range(20)])
    assert (most, ended) == (CONCURRENT_READS, 20)
    with pytest.raises(SourceUnreachable, match="away"):
        await run_all([partial(job, 30)])
    with pytest.raises(SourceUnreachable, match="away"):
        await run_all([partial(job, number) for number in range(30, 90)])
    assert ended < 40


def test_reads_are_joined_over_small_gaps() -> None:
    assert spans() == []
    assert spans((5, 10)) == [(5, 10, 1)]
    assert spans((0, 10), (10 + MAX_GAP_BYTES, 10)) == [(0, 20 + MAX_GAP_BYTES, 2)]
    assert spans((0, 10), (11 + MAX_GAP_BYTES, 10)) == [(0, 10, 1), (11 + MAX_GAP_BYTES, 10, 1)]


def test_pieces_may_overlap() -> None:
    assert spans((0, 5000), (100, 10), (4999, 2), (0, 5000)) == [(0, 5001, 4)]


def test_joined_reads_are_bounded() -> None:
    half = MAX_JOINED_BYTES // 2
    assert spans((0, half), (half, half), (2 * half, 1)) == [(0, 2 * half, 2), (2 * half, 1, 1)]
    assert spans((0, 1), (1, 2 * half), (2 * half + 1, 5)) == [(0, 1, 1), (1, 2 * half, 1), (2 * half + 1, 5, 1)]
