"""Who goes straight ahead is seen, who jumps is not, and the range asked for never overlaps itself."""

from __future__ import annotations

import itertools
import random

from qedfs.image.readahead import Readahead

MOST, STEP = 8 << 20, 1 << 18
READ = 128 << 10


def test_a_sequential_reader_is_kept_supplied_without_asking_twice() -> None:
    ahead = Readahead()
    asked_to = None
    for number in range(400):
        pos = number * READ
        advice = ahead.advise(pos, READ, most=MOST, step=STEP)
        if number == 0:
            assert advice is None
        if advice is not None:
            start, size = advice
            assert size <= MOST
            assert asked_to is None or start == asked_to
            asked_to = start + size
        if number > 20:
            assert asked_to is not None
            assert asked_to - (pos + READ) > MOST - 2 * STEP


def test_reads_that_overtake_each_other_are_one_reader() -> None:
    ahead = Readahead()
    order = [0, 1, 2, 3, 5, 4, 6, 7, 9, 8, 11, 10, 12]
    ranges = [ahead.advise(n << 20, 1 << 20, most=MOST, step=STEP) for n in order]
    covered = sorted(r for r in ranges if r is not None)
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(covered))
    assert covered[-1][0] + covered[-1][1] >= (13 << 20) + MOST - 2 * STEP


def test_random_reads_fetch_nothing_ahead() -> None:
    ahead = Readahead()
    rng = random.Random(1)
    positions = [rng.randrange(1 << 18) * 4096 for _ in range(2000)]
    assert not any(ahead.advise(pos, 4096, most=MOST, step=STEP) for pos in positions)


def test_several_readers_are_told_apart() -> None:
    ahead = Readahead()
    bases = [0, 1 << 30, 2 << 30, 3 << 30]
    for number in range(40):
        for base in bases:
            advice = ahead.advise(base + number * READ, READ, most=MOST, step=STEP)
            assert advice is None or base < advice[0] <= base + number * READ + READ + MOST
            assert number < 5 or ahead.active


def test_what_there_was_no_room_for_is_advised_again() -> None:
    ahead = Readahead()
    ahead.advise(0, READ, most=MOST, step=STEP)
    advice = ahead.advise(READ, READ, most=MOST, step=STEP)
    assert advice is not None
    start, size = advice
    ahead.fell_short(start + STEP, start + size)
    again = ahead.advise(2 * READ, READ, most=MOST, step=STEP)
    assert again is not None
    assert again[0] == start + STEP


def test_a_reader_who_has_passed_what_there_was_no_room_for_goes_on_from_where_it_is() -> None:
    ahead = Readahead()
    ahead.advise(0, READ, most=MOST, step=STEP)
    advice = (0, 0)
    for number in range(1, 40):
        advice = ahead.advise(number * READ, READ, most=MOST, step=STEP) or advice
    ahead.fell_short(READ, sum(advice))
    again = ahead.advise(40 * READ, READ, most=MOST, step=STEP)
    assert again is not None
    assert again[0] == 41 * READ
