"""How many clusters are missing: counted once, and exact from then on."""

from __future__ import annotations

from qedfs.format.tables import ZERO
from qedfs.overlay.open import open_storage
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import filled

CLUSTER = 4096


async def test_missing_clusters_are_counted() -> None:
    built = filled({0: b"a", 1: ZERO, 3: b"b"}, image_size=6 * CLUSTER + 512)
    overlay = await open_storage(MemoryStorage(built.data, writable=False))
    uncounted = overlay.missing
    await overlay.count_missing()
    assert (uncounted, overlay.missing) == (None, 4)


async def test_the_count_is_kept_by_changes() -> None:
    overlay = await open_storage(MemoryStorage(filled({0: b"a"}, image_size=5 * CLUSTER).data))
    await overlay.count_missing()
    await overlay.adopt(0, bytearray(b"x" * 2 * CLUSTER), 2 * CLUSTER)
    await overlay.adopt_zeros(3, 1)
    assert overlay.missing == 2
    await overlay.adopt_zeros(3, 1)
    assert overlay.missing == 2
