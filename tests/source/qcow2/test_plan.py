"""The pieces of the file that a read of the disk needs."""

from __future__ import annotations

from qedfs.source.qcow2.format import decode_header
from qedfs.source.qcow2.plan import Compressed, plan_read
from qedfs.source.tables.reads import Data, Zeros
from tests.source.qcow2.build import header, packed_entry

HEADER = decode_header(header(size=(64 << 10) - 100), 64 << 10)


def test_neighbours_become_one_piece() -> None:
    plan = plan_read(HEADER, 1000, 2000, [1024, 1536, 0, 1, 4096])
    assert plan.data == [Data(0, 1024 + 488, 536), Data(1560, 4096, 440)]
    assert plan.zeros == [Zeros(536, 1024)]


def test_neighbours_in_the_file_that_are_none_on_the_disk() -> None:
    plan = plan_read(HEADER, 0, 1536, [1536, 1024, 2048])
    assert [piece.at for piece in plan.data] == [0, 512, 1024]


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
