"""Free places as runs: what is taken, merged and forgotten is what a set of clusters would give."""

from __future__ import annotations

import random

import pytest

from qedfs.overlay import free_places
from qedfs.overlay.free_places import FreePlaces

C = 4096


@pytest.mark.parametrize("seed", range(4))
def test_all_is_as_a_set_would_have_it(seed: int) -> None:
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
        elif kind < 0.9:
            count, below = rng.randrange(1, 5), rng.randrange(61) * C
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
            if begin < end:
                places.drop_highest()
                model -= set(range(begin, end, C))
        assert len(places) == sum(at - C not in model for at in model)


def test_the_highest_are_forgotten_but_one_run_is_as_long_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_places, "MOST_RUNS", 3)
    places = FreePlaces(C)
    places.add(range(0, 1000 * C, C))
    places.add(at * C for at in (2000, 3000, 4000, 5000))
    places.forget_some()
    assert len(places) == 3
    assert places.take_row(1000, 1 << 40) == 0
    assert [places.take(), places.take(), places.take()] == [2000 * C, 3000 * C, None]
