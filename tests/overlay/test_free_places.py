"""Free places in blocks: what is taken, merged and forgotten is what a set of clusters would give."""

from __future__ import annotations

import itertools
import random

import pytest

from qedfs.overlay import free_places
from qedfs.overlay.free_places import FreePlaces

C = 4096


@pytest.mark.parametrize("block", [4, 7, free_places.BLOCK])
@pytest.mark.parametrize("seed", range(4))
def test_all_is_as_a_set_would_have_it(monkeypatch: pytest.MonkeyPatch, seed: int, block: int) -> None:
    monkeypatch.setattr(free_places, "BLOCK", block)
    rng, places, model = random.Random(seed), FreePlaces(C), set[int]()
    for _ in range(600):
        kind = rng.random()
        if kind < 0.5:
            new = {rng.randrange(60) * C for _ in range(rng.randrange(6))} - model
            places.add(rng.sample(sorted(new), len(new)))
            model |= new
        elif kind < 0.7:
            taken = places.take()
            assert taken == min(model, default=None)
            model.discard(taken or 0)
        elif kind < 0.75:
            most_rows, most = rng.choice((1, 2, 5)), rng.choice((1, 3, 20))
            lowest = places.take_lowest(most_rows, most)
            assert lowest == sorted(model)[: len(lowest)]
            assert bool(model) <= len(lowest) <= most
            assert sum(after != before + C for before, after in itertools.pairwise(lowest)) < most_rows
            model -= set(lowest)
        elif kind < 0.9:
            count, below = rng.choice((1, 2, 3, 4, 6, 12)), rng.randrange(61) * C
            rows = [range(at, at + count * C, C) for at in sorted(model)]
            fits = next((row for row in rows if set(row) <= model and row.stop <= below), None)
            assert places.take_row(count, below) == (None if fits is None else fits.start)
            model -= set(fits or ())
        else:
            end = rng.choice((60 * C, max(model, default=0) + C))
            begin = end
            while begin - C in model and end - C == max(model):
                begin -= C
            assert places.beginning_at(end) == begin
            places.forget(begin, end)
            model -= set(range(begin, end, C))
    assert bool(places) is bool(model)
    assert list(iter(places.take, None)) == sorted(model)


def test_the_highest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_places, "MOST_BLOCKS", 3)
    places, block = FreePlaces(C), free_places.BLOCK * C
    places.add([at * block for at in (2, 3, 4, 9, 11)] + [2 * block + C])
    places.forget_some()
    assert list(iter(places.take, None)) == [2 * block, 2 * block + C, 3 * block, 4 * block]


def test_a_hundred_thousand_scattered_clusters_are_remembered() -> None:
    places = FreePlaces(C)
    places.add(range(0, 200_000 * C, 2 * C))
    places.forget_some()
    places.add(range(C, 200_000 * C, 2 * C))
    assert places.take_row(200_000, 200_000 * C) == 0
    assert places.take() is None
