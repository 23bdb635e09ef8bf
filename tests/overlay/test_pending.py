"""The books of clusters in transition: they hold what is under way, and nothing of what has ended."""

from __future__ import annotations

from qedfs.overlay.open import open_storage
from qedfs.overlay.pending import PendingAllocations
from tests.fakes.storage import MemoryStorage

from .images import empty


async def test_writes_that_overlap_all_the_time_leave_nothing_behind() -> None:
    overlay = await open_storage(MemoryStorage(empty(cluster_size=4096, image_size=4 << 20, backing=b"base").data))
    claims = PendingAllocations(overlay.clusters)
    before = claims.merging([0, 1])
    before.__enter__()
    for cluster in range(1, 1000):
        under_way = claims.merging([cluster, cluster + 1])
        under_way.__enter__()
        before.__exit__(None, None, None)
        assert len(claims._merges) == 2
        assert claims.pending_in(range(1002)) == [cluster, cluster + 1]
        before = under_way
    before.__exit__(None, None, None)
    assert not claims._merges
    await overlay.close()
