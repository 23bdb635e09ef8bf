"""Entries that are compared all at once: what is found is what a loop over them finds, in damaged tables, too."""

from __future__ import annotations

import random
from array import array

import pytest

from qedfs.format.tables import MISSING, ZERO, empty_table
from qedfs.overlay import table_rows
from qedfs.overlay.table_rows import (
    BEGIN,
    Row,
    beginnings,
    count_missing,
    is_scattered,
    looks_scattered,
    places,
    reaches,
    rows,
)

C = 4096
STRANGE = (2**64 - 1, 2**63, 2**64 - C, 2**63 - C, C + 1, 2, C - 1)


def by_hand(entries: array[int]) -> list[Row]:
    found: list[Row] = []
    for index, entry in enumerate(entries):
        if found:
            at, first, count = found[-1]
            if entry == (first if first <= ZERO else first + count * C):
                found[-1] = (at, first, count + 1)
                continue
        found.append((index, entry, 1))
    return found


def some(rng: random.Random, count: int) -> array[int]:
    """Entries of which many continue the one before, and some are invalid."""
    found = array("Q", [rng.choice((MISSING, ZERO, rng.randrange(9) * C))])
    calm = rng.random()
    while len(found) < count:
        before = found[-1]
        if rng.random() < calm:
            found.append(before if before <= ZERO else (before + C) % 2**64)
        else:
            found.append(rng.choice((MISSING, ZERO, before, C, rng.randrange(1, 9) * C, rng.choice(STRANGE))))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_everything_is_as_a_loop_finds_it(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        entries = some(rng, rng.choice((1, 2, 3, 7, 40)))
        assert rows(entries, C) == by_hand(entries)
        assert count_missing(entries, C) == entries.count(MISSING)
        limit = rng.choice((1, C, 5 * C, 2**62, 2**63 - C))
        assert reaches(entries, limit) == (max(entries) >= limit)
        found = places(entries, C)
        assert (found is None) == any(entry > ZERO and entry % C for entry in entries)
        if found is not None:
            clusters, data, zeros = found
            assert list(clusters) == [entry // C for entry in entries]
            assert (data, zeros) == (sum(entry > ZERO for entry in entries), entries.count(ZERO))


def test_no_entries_are_no_rows() -> None:
    nothing = empty_table(0)
    assert (rows(nothing, C), beginnings(nothing, C), count_missing(nothing, C)) == ([], b"", 0)
    assert not reaches(nothing, 1)


@pytest.mark.parametrize(
    ("entries", "begin"),
    [([C, 2 * C, 3 * C, 9 * C, 10 * C], [0, 3]), ([0, 0, 1, 1, 4 * C], [0, 2, 4]), ([9 * C, 5 * C, C], [0, 1, 2])],
)
def test_a_row_begins_where_an_entry_does_not_continue(entries: list[int], begin: list[int]) -> None:
    found = beginnings(array("Q", entries), C)
    assert [index for index, byte in enumerate(found) if byte == BEGIN] == begin
    assert set(found) <= {0, BEGIN}


def test_a_table_in_rows_needs_no_loop_over_its_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(*_: object) -> list[Row]:
        raise AssertionError("entry by entry")

    monkeypatch.setattr(table_rows, "_one_by_one", loop)
    row = array("Q", range(C, 4097 * C, C))
    assert rows(row + row + empty_table(100), C) == [(0, C, 4096), (4096, C, 4096), (8192, MISSING, 100)]


@pytest.mark.parametrize("count", [1, 31, 1000])
def test_a_guess_tells_scattered_entries_from_rows_and_holes(count: int) -> None:
    mixed = list(range(C, (count + 1) * C, C))
    random.Random(count).shuffle(mixed)
    assert looks_scattered(array("Q", mixed), C) == (count > 2)
    for entries in (range(C, (count + 1) * C, C), [MISSING] * count, [ZERO] * count):
        assert not looks_scattered(array("Q", entries), C)


def test_scattered_is_what_has_hardly_two_neighbours() -> None:
    assert is_scattered(beginnings(array("Q", range(100 * C, 0, -C)), C))
    assert not is_scattered(beginnings(array("Q", range(C, 100 * C, C)), C))
