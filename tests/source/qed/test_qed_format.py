"""Headers and entries of a QED image that is only read: what is understood, and what is refused by which words."""

from __future__ import annotations

import pytest

from qedfs.source.qed.format import decode_header, plan_read, reads_zero, table_offset
from qedfs.source.tables.faults import Fault
from qedfs.source.tables.reads import Data, Zeros
from tests.source.qed.support import CLUSTER, L1, L2, header

FILE = 64 << 10
GOOD = decode_header(header(), FILE)


def test_what_qemu_opens_only_for_reading() -> None:
    assert GOOD.geometry.image_size == 1 << 20
    assert decode_header(header(features=2), FILE).dirty
    assert decode_header(header(compat=1 << 9, autoclear=1 << 47), FILE).geometry == GOOD.geometry
    assert not decode_header(header(features=1, name=(64, 0)), FILE).has_backing, "an empty name is none"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"magic": b"QFI\xfb"}, "cannot be read as a QED image: not a QED image"),
        ({"features": 1, "name": (64, 9)}, "has a backing file of its own, which is never followed"),
        ({"features": 8}, "features that this version does not know: 0x8"),
        ({"cluster_size": 2048}, "cluster size 2048"),
        ({"table_size": 3}, "table size 3"),
        ({"table_size": 32}, "table size 32"),
        ({"size": 1000}, "image size 1000 is not a multiple of 512"),
        ({"size": 1 << 62}, "more than the tables can describe"),
        ({"header_size": 0}, "header size 0 clusters"),
        ({"header_size": 2}, "L1 table at 0x1000 is not inside the file"),
        ({"l1_offset": L1 + 8}, "L1 table at 0x1008 is not inside the file"),
        ({"l1_offset": FILE}, "L1 table at 0x10000 is not inside the file"),
        ({"l1_offset": 0}, "L1 table at 0x0 is not inside the file"),
    ],
)
def test_headers_that_are_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(Fault, match=words):
        decode_header(header(**fields), FILE)  # type: ignore[arg-type]


def test_a_file_that_ends_in_its_header() -> None:
    with pytest.raises(Fault, match="shorter than a header"):
        decode_header(header()[:40], 40)


def test_l1_entries() -> None:
    assert table_offset(GOOD, FILE, 0) is None
    assert table_offset(GOOD, FILE, L2) == L2
    # The header, the end of the file, a cluster that the end cuts off, and the value that means zeros in L2 only.
    for entry, size in ((0x200, FILE), (1, FILE), (L2 + 512, FILE), (FILE, FILE), (FILE - CLUSTER, FILE - 1)):
        with pytest.raises(
            Fault, match=f"has an L2 table at {entry:#x}, which is no place for one in a file of {size}"
        ):
            table_offset(GOOD, size, entry)


def test_l2_entries() -> None:
    assert [reads_zero(entry) for entry in (0, 1, 2, L2)] == [True, True, False, False]
    plan = plan_read(GOOD, FILE, 1000, 4 * CLUSTER, [0x4000, 0x5000, 0, 1, 0x8000])
    assert plan.data == [Data(0, 0x4000 + 1000, 2 * CLUSTER - 1000), Data(4 * CLUSTER - 1000, 0x8000, 1000)]
    assert plan.zeros == [Zeros(2 * CLUSTER - 1000, 2 * CLUSTER)]
    for entry, size in (
        (2, FILE),
        (0x4001, FILE),
        (0x4200, FILE),
        (FILE, FILE),
        (FILE - CLUSTER, FILE - 1),
        (0x10, FILE),
    ):
        with pytest.raises(Fault, match=f"has a cluster at {entry:#x}, which is no place for one in a file of {size}"):
            plan_read(GOOD, size, 0, 512, [entry])
