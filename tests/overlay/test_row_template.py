"""Entries that are compared with the row that they should be."""

from __future__ import annotations

import random
from array import array

import pytest

from qedfs.format.tables import encode_table
from qedfs.overlay.row_template import RowTemplate


@pytest.mark.parametrize("bits", range(12, 27))
def test_what_fits_is_a_row_and_nothing_else(bits: int) -> None:
    rng = random.Random(bits)
    template = RowTemplate(1 << bits)
    for _ in range(60):
        count = rng.choice((1, 2, 7, 300))
        # Near the border of a period, whatever its length, or anywhere up to the end of the largest file.
        near = rng.randrange(1, 40) << rng.randrange(5, 20)
        first = rng.choice((near - rng.randrange(0, 32), rng.randrange(1 << 63 - bits), 0)) << bits
        first = min(max(0, first), (1 << 63) - (count << bits))
        row = array("Q", range(first, first + (count << bits), 1 << bits))
        assert template.fits(memoryview(encode_table(row)), first)
        index = rng.randrange(count)
        row[index] ^= 1 << rng.randrange(64)
        assert not template.fits(memoryview(encode_table(row)), first)
