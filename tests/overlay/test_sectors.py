"""Changed sectors become as few writes as there are rows of neighbours."""

from __future__ import annotations

from qedfs.overlay.sectors import joined


def test_neighbours_are_one_write() -> None:
    a, b, c, last = b"a" * 512, b"b" * 512, b"c" * 512, b"l" * 24
    assert joined([(1024, b), (512, a), (8192, c), (1536, last)]) == [(512, a + b + last), (8192, c)]
    assert joined([]) == []
