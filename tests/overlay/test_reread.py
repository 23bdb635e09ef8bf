"""All that may run beside a barrier that fails: what is seen of the overlay afterwards is what its file has."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qedfs.errors import QedfsError
from qedfs.host import memory_pool
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.harness.hang import HANG_SECONDS
from tests.harness.sample import sample
from tests.overlay.images import empty
from tests.overlay.scenario import repeatable

CLUSTER = 4096
TABLE = CLUSTER // 8  # clusters that one table describes
TABLES = 16
IMAGE = TABLES * TABLE * CLUSTER
WORKERS, CALLS = 6, 12
MOST_BARRIER = 14  # the last one that may be the one that fails


def a_call(overlay: Overlay, rng: random.Random) -> Callable[[], Awaitable[object]]:
    """Something that readers, guests, streams and commits do."""
    cluster = rng.randrange(TABLES) * TABLE + rng.randrange(8)
    pos = cluster * CLUSTER

    async def fill(_: int) -> bytes:
        for _ in range(rng.randrange(20)):
            await trio.lowlevel.checkpoint()
        return bytes(CLUSTER)

    return rng.choice(
        [
            lambda: overlay.write(pos, b"w" * CLUSTER, fill),
            lambda: overlay.write(pos + 512, b"w" * 512, fill),
            lambda: overlay.adopt(pos, bytearray(b"a" * CLUSTER), CLUSTER),
            lambda: overlay.adopt_zeros(cluster, 3),
            lambda: overlay.map(pos, CLUSTER),
            overlay.flush,
            overlay.commit,
            overlay.count_missing,
            lambda: overlay.change_record(lambda record: record),
        ]
    )


async def storm(overlay: Overlay, rng: random.Random) -> None:
    """Many calls at once. Those that come after the barrier has failed are refused."""

    async def worker() -> None:
        for _ in range(CALLS):
            try:
                await a_call(overlay, rng)()
            except QedfsError:
                assert overlay.failure is not None

    with trio.fail_after(HANG_SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(worker)


async def same_as_the_file(overlay: Overlay, image: bytearray) -> None:
    onlooker = MemoryStorage(image, writable=False)
    onlooker.locked = False
    other = await open_storage(onlooker)
    await other.count_missing()
    await overlay.count_missing()
    assert not overlay.commit_pending
    assert await overlay.map(0, IMAGE) == await other.map(0, IMAGE)
    assert overlay.missing == other.missing
    await other.close()


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("seed", range(sample(20, whole=60)))
def test_a_failed_barrier_leaves_the_map_of_the_file(seed: int, journal: bool, tmp_path: Path) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        used_bytes = memory_pool.TABLES.used_bytes
        storage = MemoryStorage(empty(image_size=IMAGE).data, name="disk", seed=seed)
        overlay = await open_storage(storage, journal_folder=tmp_path if journal else None)
        storage.fail("barrier", QedfsError("EIO"), nth=rng.randrange(2, MOST_BARRIER))
        await storm(overlay, rng)
        while overlay.failure is None:
            with contextlib.suppress(QedfsError):
                await overlay.flush()
        await same_as_the_file(overlay, storage.bytes)
        with pytest.raises(QedfsError, match="EIO"):
            await overlay.close()
        assert memory_pool.TABLES.used_bytes == used_bytes

    with repeatable(seed):
        trio.run(main)
