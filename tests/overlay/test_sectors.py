"""Changed sectors become as few writes as there are rows of neighbours."""

from __future__ import annotations

from qedfs.overlay.sectors import joined, joined_ranges


def test_neighbours_are_one_write() -> None:
    a, b, c, last = b"a" * 512, b"b" * 512, b"c" * 512, b"l" * 24
    assert joined([(1024, b), (512, a), (8192, c), (1536, last)]) == [(512, a + b + last), (8192, c)]
    assert joined([]) == []


def test_neighbours_are_one_range() -> None:
    assert joined_ranges([(8192, 4096), (0, 4096), (4096, 4096), (20480, 4096)]) == [(0, 12288), (20480, 4096)]
    assert joined_ranges([]) == []
