"""A served image over an overlay in memory and a fake source, for tests under a mock clock."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from qedfs.fetch.queue import FetchQueue
from qedfs.image.commit_schedule import COMMIT_SECONDS
from qedfs.image.image import Image
from qedfs.overlay.open import open_storage
from qedfs.source.pinning import USUAL, Pinning
from tests.fakes.source import FakeSource, remote
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty

CLUSTER = 1 << 16


async def tended(image: Image) -> None:
    """Look after an image as a mount does, until cancelled."""
    while True:
        await trio.sleep(COMMIT_SECONDS)
        await image.tend()


@contextlib.asynccontextmanager
async def served(
    source: FakeSource,
    *,
    image_size: int | None = None,
    storage: MemoryStorage | None = None,
    copy_on_read: bool = True,
    deadline_seconds: float = 30.0,
    cluster_size: int = CLUSTER,
    pinning: Pinning = USUAL,
) -> AsyncIterator[Image]:
    """An image on `source`, counted and committing, closed at the end."""
    size = len(source.content) if image_size is None else image_size
    storage = storage or MemoryStorage(
        empty(cluster_size=cluster_size, image_size=size, backing=b"http://fake/disk.raw").data
    )
    async with trio.open_nursery() as nursery:
        told = remote(source, deadline_seconds=deadline_seconds, pinning=pinning)
        fetch = FetchQueue(told, cluster_size, nursery)
        image = Image("disk.raw", await open_storage(storage), fetch, copy_on_read=copy_on_read)
        nursery.start_soon(tended, image)
        await image.overlay.count_missing()
        yield image
        await image.close()
        nursery.cancel_scope.cancel()
