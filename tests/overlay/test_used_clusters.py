"""The bitmap of used clusters."""

from __future__ import annotations

import itertools
import random

import pytest

from qedfs.overlay.used_clusters import UsedClusters


def test_what_is_unused_is_what_nobody_has_claimed() -> None:
    rng = random.Random(1)
    for _ in range(200):
        used = UsedClusters(72)
        first, stop = sorted((rng.randrange(72), rng.randrange(73)))
        claimed: set[int] = set()
        for _ in range(rng.randrange(40)):
            if rng.random() < 0.8:
                cluster = rng.randrange(72)
                assert used.claim(cluster) == (cluster not in claimed)
                claimed.add(cluster)
            elif rng.random() < 0.5:
                row = range(at := rng.randrange(72), rng.randrange(at, 73))
                free = not claimed & set(row)
                assert used.claim_row(at, len(row)) == free
                claimed |= set(row if free else ())
            else:
                table = range(at := rng.randrange(64), at + rng.choice((1, 4, 8)))
                assert used.claim_table(at, len(table)) == len(claimed & set(table))
                claimed |= set(table)
        assert used.count == len(claimed)
        runs = list(used.unused(first, stop))
        assert [cluster for at, end in runs for cluster in range(at, end)] == [
            cluster for cluster in range(first, stop) if cluster not in claimed
        ]
        assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(runs))


@pytest.mark.parametrize("seed", range(3))
def test_scattered_clusters_are_marked_and_settled(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        used = UsedClusters(72)
        rows = rng.sample(range(4, 72), 9)
        scattered = rng.sample(range(4, 72), 9)
        if rng.random() < 0.5:
            scattered = [cluster for cluster in scattered if cluster not in rows]
        for cluster in rows:
            used.claim(cluster)
        used.claim_scattered([0, *scattered, 0], len(scattered))
        sound = not set(rows) & set(scattered)
        assert used.settle(4) == sound
        if sound:
            free = [cluster for at, end in used.unused(4, 72) for cluster in range(at, end)]
            assert free == [cluster for cluster in range(4, 72) if cluster not in {*rows, *scattered}]


@pytest.mark.parametrize("wrong", [3, 72, 1 << 50])
def test_a_scattered_cluster_in_the_header_or_past_the_end_is_noticed(wrong: int) -> None:
    used = UsedClusters(72)
    used.claim_scattered([9, wrong, 10], 3)
    assert not used.settle(4)


def test_the_same_cluster_twice_is_noticed() -> None:
    used = UsedClusters(72)
    used.claim_scattered([9, 10], 2)
    used.claim_scattered([11, 9], 2)
    assert not used.settle(4)


def test_nothing_scattered_is_settled_whatever_else_there_is() -> None:
    used = UsedClusters(72)
    assert used.claim(9)
    assert not used.claim(9)
    assert used.settle(4)
