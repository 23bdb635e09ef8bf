"""The bitmap of used clusters."""

from __future__ import annotations

import itertools
import random

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
