"""Pieces and the reads that bring them."""

from __future__ import annotations

from qedfs.source.qcow2.format import decode_header
from qedfs.source.qcow2.plan import MAX_GAP_BYTES, MAX_JOINED_BYTES, Compressed, Data, Zeros, join, plan_read
from tests.source.qcow2.build import header, packed_entry

HEADER = decode_header(header(size=(64 << 10) - 100), 64 << 10)


def spans(*pieces: tuple[int, int]) -> list[tuple[int, int, int]]:
    return [(batch.offset, batch.size, len(batch.pieces)) for batch in join(Data(0, *piece) for piece in pieces)]


def test_neighbours_become_one_piece() -> None:
    plan = plan_read(HEADER, 1000, 2000, [1024, 1536, 0, 1, 4096])
    assert plan.data == [Data(0, 1024 + 488, 536), Data(1560, 4096, 440)]
    assert plan.zeros == [Zeros(536, 1024)]


def test_neighbours_in_the_file_that_are_none_on_the_disk() -> None:
    plan = plan_read(HEADER, 0, 1536, [1536, 1024, 2048])
    assert [piece.at for piece in plan.data] == [0, 512, 1024]
    assert spans((1536, 512), (1024, 512), (2048, 512)) == [(1024, 1536, 3)]


def test_bytes_behind_the_end_of_the_file_are_zeros() -> None:
    short = decode_header(header(), 2048 + 100)
    assert plan_read(short, 0, 512, [2048]).data == [Data(0, 2048, 100)]
    assert plan_read(short, 0, 512, [2048]).zeros == [Zeros(100, 412)]
    assert plan_read(short, 100, 300, [2048]).data == []
    assert plan_read(short, 100, 300, [2048]).zeros == [Zeros(0, 300)]


def test_compressed_clusters_whole_and_in_part() -> None:
    entry = packed_entry(1100, 300)
    plan = plan_read(HEADER, 100, 1000, [entry, entry, entry])
    assert plan.compressed == [
        Compressed(0, 1100, 436, 100, 412, whole=False),
        Compressed(412, 1100, 436, 0, 512, whole=True),
        Compressed(924, 1100, 436, 0, 76, whole=False),
    ]
    last = (64 << 10) - 512
    assert plan_read(HEADER, last, 412, [entry]).compressed[0].whole, "the disk has no more of it"
    assert not plan_read(HEADER, last, 411, [entry]).compressed[0].whole


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
