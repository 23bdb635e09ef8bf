"""The map of an overlay: runs, counting, the cache of slices."""

from __future__ import annotations

import pytest

from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import Run
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import Built, empty, filled

CLUSTER = 4096


async def opened(built: Built, *, writable: bool = False) -> Overlay:
    return await Overlay.open(MemoryStorage(built.data, writable=writable))


async def test_runs_are_split_by_state_and_joined_by_place() -> None:
    built = filled({0: b"a", 1: b"b", 3: ZERO, 4: ZERO, 7: b"c", 6: b"d"})
    data = built.header.area_bytes + 2 * CLUSTER
    overlay = await opened(built)

    assert await overlay.map(0, 8 * CLUSTER) == [
        Run(data, 0, 2 * CLUSTER),
        Run(MISSING, 2 * CLUSTER, CLUSTER),
        Run(ZERO, 3 * CLUSTER, 2 * CLUSTER),
        Run(MISSING, 5 * CLUSTER, CLUSTER),
        Run(data + 3 * CLUSTER, 6 * CLUSTER, CLUSTER),
        Run(data + 2 * CLUSTER, 7 * CLUSTER, CLUSTER),
    ]


@pytest.mark.parametrize("state", [MISSING, ZERO])
async def test_a_data_cluster_is_no_part_of_the_run_before_it(state: int) -> None:
    """The place of the data cluster equals the length of the missing run before it (4 clusters, offset 0x4000)."""
    built = filled({4: b"data", **(dict.fromkeys(range(4), ZERO) if state else {})})
    place = built.header.area_bytes + 2 * CLUSTER
    assert place == 4 * CLUSTER
    overlay = await opened(built)
    skipped = 1 if state else 0  # entry 1: the sum is one more than the size

    assert await overlay.map(skipped, 5 * CLUSTER - skipped) == [
        Run(state, skipped, 4 * CLUSTER - skipped),
        Run(place, 4 * CLUSTER, CLUSTER),
    ]


async def test_a_request_inside_a_cluster_is_clipped() -> None:
    built = filled({0: b"a", 1: ZERO})
    overlay = await opened(built)
    assert await overlay.map(100, 50) == [Run(built.header.area_bytes + 2 * CLUSTER + 100, 100, 50)]
    assert await overlay.map(CLUSTER + 1, 2) == [Run(ZERO, CLUSTER + 1, 2)]
    assert await overlay.map(5 * CLUSTER + 1, 2) == [Run(MISSING, 5 * CLUSTER + 1, 2)]


async def test_missing_clusters_are_counted_and_found() -> None:
    overlay = await opened(filled({0: b"a", 1: ZERO, 3: b"b"}, image_size=6 * CLUSTER + 512))
    assert overlay.clusters.missing is None
    await overlay.clusters.count()
    assert overlay.clusters.missing == 4
    assert await overlay.clusters.next_missing(0, 8) == (2, 1)
    assert await overlay.clusters.next_missing(3, 8) == (4, 3)
    assert await overlay.clusters.next_missing(3, 2) == (4, 2)
    assert await overlay.clusters.next_missing(7, 2) is None


async def test_the_count_is_kept_by_changes() -> None:
    overlay = await opened(filled({0: b"a"}, image_size=5 * CLUSTER), writable=True)
    await overlay.clusters.count()
    await overlay.adopt(0, bytearray(b"x" * 2 * CLUSTER), 2 * CLUSTER)
    await overlay.adopt_zeros(3, 1)
    assert overlay.clusters.missing == 2
    await overlay.adopt_zeros(3, 1)
    assert overlay.clusters.missing == 2


async def test_a_stretch_without_table_is_missing() -> None:
    overlay = await opened(empty(image_size=8 << 20))
    assert await overlay.clusters.next_missing(3, 10_000) == (3, 512 - 3)
    await overlay.clusters.count()
    assert overlay.clusters.missing == 2048
