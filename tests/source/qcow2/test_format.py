"""Headers and entries: what is understood, and what is refused by which words."""

from __future__ import annotations

import pytest

from qedfs.source.qcow2.format import (
    Packed,
    Qcow2Header,
    decode_header,
    decode_table,
    find_cluster,
    reads_zero,
    table_offset,
)
from qedfs.source.tables.faults import Fault
from tests.source.qcow2.build import COMPRESSED, COPIED, header

FILE = 64 << 10


def test_version_3() -> None:
    assert decode_header(header(), FILE) == Qcow2Header(3, 9, 64 << 10, 512, 2, 0, FILE)


def test_version_2_has_no_features() -> None:
    data = header(version=2, features=2, length=7)
    assert decode_header(data, FILE) == Qcow2Header(2, 9, 64 << 10, 512, 2, 0, FILE)
    assert decode_header(data[:72], FILE) == Qcow2Header(2, 9, 64 << 10, 512, 2, 0, FILE)


def test_dirty_image_is_read() -> None:
    assert decode_header(header(features=1), FILE).l1_entries == 2


def test_longer_table_than_the_size_needs() -> None:
    assert decode_header(header(l1_size=100), FILE).l1_entries == 2


@pytest.mark.parametrize(("size", "entries"), [(0, 0), (1, 1), (32 << 10, 1), ((32 << 10) + 1, 2)])
def test_count_of_needed_entries(size: int, entries: int) -> None:
    assert decode_header(header(size=size), FILE).l1_entries == entries


def test_compression_type() -> None:
    assert decode_header(header(features=8, length=112, compression=1), FILE).compression == 1
    assert decode_header(header(length=112, compression=0), FILE).compression == 0
    # Behind a header of 104 bytes stands an extension, whose first byte means something else.
    assert decode_header(header(length=104, compression=0xE2), FILE).compression == 0


def test_backing_name_that_is_empty_is_none() -> None:
    assert decode_header(header(backing=(600, 0)), FILE)
    assert decode_header(header(backing=(0, 9)), FILE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a qcow2 image"),
        (header()[:71], "is not a qcow2 image"),
        (header(magic=b"QED\0"), "is not a qcow2 image"),
        (header(version=1), "of version 1; versions 2 and 3"),
        (header(version=4), "of version 4"),
        (header()[:103], "ends inside its header"),
        (header(cluster_bits=8), r"clusters of 2\^8 bytes"),
        (header(cluster_bits=22), r"clusters of 2\^22 bytes"),
        (header(cluster_bits=(1 << 32) - 1), r"clusters of 2\^4294967295 bytes"),
        (header(length=96), "header of 96 bytes"),
        (header(length=513), "header of 513 bytes"),
        (header(crypt=1), "is encrypted"),
        (header(version=2, crypt=2), "is encrypted"),
        (header(backing=(300, 11)), "backing file of its own, which is never followed; .*qemu-img convert"),
        (header(size=1 << 63), "claims a size of 9223372036854775808 bytes"),
        (header(size=(1 << 63) - 1), "L1 table of 2 entries but needs"),
        (header(l1_size=1), "L1 table of 1 entries but needs 2 for its size"),
        (header(l1_size=(4 << 20) + 1), "4194305 entries; the limit is 4194304"),
        (header(l1_offset=513), "L1 table at 0x201, which is not the start of a cluster"),
        (header(l1_offset=FILE), "L1 table at 0x10000, outside the file of 65536 bytes"),
        (header(l1_offset=(1 << 64) - 512), "outside the file"),
        (header(features=4), "external file, which is never followed"),
        (header(features=16), "subclusters"),
        (header(features=1 << 5 | 1 << 63 | 1), "unknown features \\(0x8000000000000020\\)"),
        (header(features=8), r"contradicts itself about its compression type \(0\)"),
        (header(length=112, compression=1), r"contradicts itself about its compression type \(1\)"),
        (header(features=8, length=112, compression=2), "unknown compression type 2"),
    ],
)
def test_refused_header(data: bytes, message: str) -> None:
    with pytest.raises(Fault, match=message):
        decode_header(data, FILE)


# Entries.

V3 = decode_header(header(), FILE)
V2 = decode_header(header(version=2), FILE)


def test_table_is_big_endian() -> None:
    assert decode_table(bytes.fromhex("0102030405060708 00000000000000ff")).tolist() == [0x0102030405060708, 255]


def test_l1_entry() -> None:
    assert table_offset(V3, 0) is None
    assert table_offset(V3, COPIED) is None
    assert table_offset(V3, COPIED | 1024) == 1024
    assert table_offset(V3, FILE - 512) == FILE - 512


def test_l1_entry_outside() -> None:
    with pytest.raises(Fault, match="outside the file"):
        table_offset(V3, FILE)


def test_reserved_bits_are_passed_over() -> None:
    for reserved in (1, 1 << 8, 1 << 56, 1 << 62):
        assert table_offset(V3, reserved) is None
        assert table_offset(V3, COPIED | 1024 | reserved) == 1024
    for reserved in (2, 1 << 8, 1 << 56, 1 << 61):
        assert find_cluster(V3, reserved) is None
        assert find_cluster(V3, 1024 | 1 | reserved) is None
        assert find_cluster(V3, COPIED | 1024 | reserved) == 1024


def test_marked_as_corrupt() -> None:
    assert decode_header(header(features=2 | 1), FILE).corrupt
    assert not V3.corrupt
    assert not V2.corrupt


def test_l1_entry_between_clusters() -> None:
    wide = decode_header(header(cluster_bits=12, l1_offset=4096), FILE)
    with pytest.raises(Fault, match="L2 table at 0x200, which is not the start of a cluster"):
        table_offset(wide, 512)
    with pytest.raises(Fault, match="a cluster at 0x200, which is not a multiple of its size"):
        find_cluster(wide, 512)
    with pytest.raises(Fault, match="a cluster at 0x200, which is not a multiple of its size"):
        find_cluster(wide, 512 | 1)


def test_zeros() -> None:
    for entry in (0, COPIED):
        assert reads_zero(V3, entry)
        assert reads_zero(V2, entry)
        assert find_cluster(V3, entry) is None
    for entry in (1, COPIED | 1, COPIED | 1024 | 1, 1 << 40 | 1):
        assert reads_zero(V3, entry)
        assert find_cluster(V3, entry) is None


def test_data() -> None:
    assert find_cluster(V3, COPIED | 1024) == 1024
    assert find_cluster(V2, 1024) == 1024
    assert find_cluster(V3, FILE - 512) == FILE - 512
    short = decode_header(header(), FILE - 511)
    assert find_cluster(short, FILE - 512) == FILE - 512


def test_compressed() -> None:
    # With clusters of 512 bytes, bit 61 is the count of further sectors and the rest the offset.
    assert find_cluster(V3, COMPRESSED | 1001) == Packed(1001, 23)
    assert find_cluster(V3, COMPRESSED | 1 << 61 | 1001) == Packed(1001, 535)
    assert find_cluster(V3, COMPRESSED | 1 << 61 | FILE - 3) == Packed(FILE - 3, 3)
    wide = decode_header(header(cluster_bits=16, l1_offset=0), FILE)
    assert find_cluster(wide, COMPRESSED | 0xFF << 54 | 512) == Packed(512, FILE - 512)
    assert find_cluster(wide, COMPRESSED | 3 << 54 | 512) == Packed(512, 2048)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (FILE, "a cluster at 0x10000, outside the file of 65536 bytes"),
        (COMPRESSED | FILE, "compressed cluster at 0x10000, outside the file"),
        (COMPRESSED | (1 << 61) - 1, "outside the file"),
    ],
)
def test_refused_l2_entry(entry: int, message: str) -> None:
    assert not reads_zero(V3, entry)
    with pytest.raises(Fault, match=message):
        find_cluster(V3, entry)


def test_version_2_has_no_zero_flag() -> None:
    assert not reads_zero(V2, 1)
    with pytest.raises(Fault, match="a zero cluster, which version 2 does not have"):
        find_cluster(V2, 1024 | 1)
