"""In how many pieces an overlay is: counted over slices, holes and the pieces that go on."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise

import pytest

from qedfs.overlay.fragments import Fragments, fragments
from qedfs.overlay.open import open_storage
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import filled

C = 4096


@pytest.mark.parametrize(
    ("parts", "pieces", "longest"),
    [
        ([[C, 2 * C, 3 * C]], 1, 3),
        ([[C, 2 * C], [], [3 * C]], 1, 3),
        ([[C, 2 * C], [4 * C, 5 * C, 6 * C]], 2, 3),
        ([[C], [2 * C, 4 * C, 5 * C]], 2, 2),
        ([[3 * C, 2 * C, C]], 3, 1),
        ([[9 * C, C, 2 * C], [3 * C, 4 * C], [5 * C, 9 * C]], 3, 5),
        ([[]], 0, 0),
    ],
)
def test_neighbours_in_the_image_that_are_neighbours_in_the_file_are_one_piece(
    parts: list[list[int]], pieces: int, longest: int
) -> None:
    found = Fragments()
    for part in parts:
        found.add(array("Q", part), C)
    assert (found.pieces, found.longest, found.data) == (pieces, longest * C, sum(map(len, parts)) * C)


@pytest.mark.parametrize("seed", range(3))
def test_scattered_clusters_are_counted_as_a_loop_counts_them(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        entries = array("Q")
        while len(entries) < 24:
            first = rng.randrange(1, 999)
            calm = rng.choice((1, 1, 2, 12))
            row = [(first + step) * C for step in range(calm)]
            entries.extend(row if not set(row) & set(entries) else [rng.choice((0, 1))])
        found = Fragments()
        for at in range(0, len(entries), 8):
            found.add(entries[at : at + 8], C)
        data = [entry for entry in entries if entry > 1]
        lengths = [0]
        for before, place in pairwise([0, *data]):
            lengths = [*lengths[:-1], lengths[-1] + 1] if place == before + C and before else [*lengths, 1]
        assert (found.data, found.pieces) == (len(data) * C, len(lengths) - 1)
        assert found.longest == max(lengths) * C


async def test_clusters_of_several_tables_are_counted_and_zeros_passed_over() -> None:
    built = filled({1: b"a" * C, 3: b"b" * C, 4: 1, 600: b"c" * C, 3000: b"d" * C}, image_size=16 << 20)
    overlay = await open_storage(MemoryStorage(built.data))
    await overlay.load(0, overlay.image_size)
    places = [overlay.clusters.entry(n) for n in (1, 3, 600, 3000)]
    found = await fragments(overlay.tables, overlay.clusters)
    jumps = sum(place != before + C for before, place in pairwise(places))
    assert (found.data, found.pieces) == (4 * C, 1 + jumps)
