"""Filling a buffer with zeros: all of the view, and nothing beside it."""

from __future__ import annotations

import pytest

from qedfs.source.zeros import clear


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 1 << 20])
def test_the_view_and_nothing_beside_it(size: int) -> None:
    buffer = bytearray(b"x" * (size + 2))
    clear(memoryview(buffer)[1 : 1 + size])
    assert buffer == b"x" + bytes(size) + b"x"
