"""An overlay is never filled from two versions of a source: the pin, in memory and through remounts."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from qedfs.errors import SourceChanged
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

OLD = random.Random(1).randbytes(8 * CLUSTER)
NEW = random.Random(2).randbytes(8 * CLUSTER)


def overlay() -> MemoryStorage:
    """An empty overlay in memory."""
    return MemoryStorage(empty(cluster_size=CLUSTER, image_size=len(OLD), backing=b"http://fake/disk.raw").data)


async def test_nothing_kept_of_the_old_version_takes_the_new_one(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    storage = overlay()
    failing = FakeSource(OLD)
    async with served(failing, storage=storage) as image:
        await image.source_size()
        assert image.overlay.record.pin is not None
    again = MemoryStorage(storage.bytes)
    async with served(FakeSource(NEW, etag='"v2"'), storage=again) as image:
        assert bytes(await image.read(0, CLUSTER)) == NEW[:CLUSTER]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "http://fake/disk.raw" in warnings[0]
    assert "v2" in warnings[0]
    # From now on the new version is the one that counts.
    async with served(FakeSource(OLD), storage=MemoryStorage(again.bytes)) as image:
        assert bytes(await image.read(0, CLUSTER)) == NEW[:CLUSTER]
        with pytest.raises(SourceChanged):
            await image.read(CLUSTER, 512)


@pytest.mark.parametrize("keep", ["read", "zeros", "write"])
async def test_one_cluster_kept_refuses_the_new_version(autojump_clock: trio.testing.MockClock, keep: str) -> None:
    storage = overlay()
    content = bytes(CLUSTER) + OLD[CLUSTER:] if keep == "zeros" else OLD
    async with served(FakeSource(content), storage=storage) as image:
        await image.source_size()
        if keep == "write":
            await image.write(0, b"w" * CLUSTER)
        else:
            await image.read(0, 512)
    async with served(FakeSource(NEW, etag='"v2"'), storage=MemoryStorage(storage.bytes)) as image:
        local = b"w" * CLUSTER if keep == "write" else content[:CLUSTER]
        assert bytes(await image.read(0, CLUSTER)) == local
        with pytest.raises(SourceChanged, match=r"Bring the old version back, or start a new overlay"):
            await image.read(CLUSTER, 512)


async def test_without_copy_on_read_a_write_of_part_of_a_cluster_pins(autojump_clock: trio.testing.MockClock) -> None:
    """The rest of that cluster comes from the source, and stays."""
    storage = overlay()
    async with served(FakeSource(OLD), storage=storage, copy_on_read=False) as image:
        await image.write(5, b"part")
    async with served(FakeSource(NEW, etag='"v2"'), storage=MemoryStorage(storage.bytes)) as image:
        assert bytes(await image.read(0, 9)) == OLD[:5] + b"part"
        with pytest.raises(SourceChanged):
            await image.read(CLUSTER, 512)


async def test_two_who_count_at_once_count_once(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the source counts beside the task that counts for the status; twice half full is not full."""
    storage = overlay()
    async with served(FakeSource(OLD), storage=storage) as image:
        await image.read(0, 4 * CLUSTER)
    async with served(FakeSource(OLD), storage=MemoryStorage(storage.bytes)) as image:
        count = image.overlay.clusters.missing_count
        # As with a disk that has to be waited for.
        monkeypatch.setattr(image.overlay.storage, "read_now", lambda *_: False)
        image.overlay.tables.slices.clear()
        count._counted_to = count._counted = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count.count)
            nursery.start_soon(count.count)
        assert count.total == 4
