"""An overlay that somebody cuts or overwrites while it is open: it shows nothing of nobody, and is never complete."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qedfs.errors import BadOverlay, QedfsError
from qedfs.format.tables import MISSING
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from tests.fakes.storage import MemoryStorage
from tests.harness.sample import sample
from tests.overlay.images import filled

CLUSTER = 4096
CLUSTERS = 40
SIZE = CLUSTERS * CLUSTER


async def fill(cluster: int) -> bytes:
    return content("b", cluster)


def content(who: str, cluster: int) -> bytes:
    """What a cluster holds: of the backing ("b"), or of a guest's write."""
    return f"{who}{cluster:07}".encode() * (CLUSTER // 8)


async def found_in(overlay: Overlay, cluster: int) -> bytes | None:
    """A cluster as a reader gets it; None: an error."""
    data = bytearray(CLUSTER)
    try:
        (run,) = await overlay.map(cluster * CLUSTER, CLUSTER)
        if run.offset == MISSING:
            return await fill(cluster)
        await overlay.read_data(run.offset, memoryview(data))
    except BadOverlay:
        return None
    return bytes(data)


async def half_full(storage: MemoryStorage | None = None) -> tuple[MemoryStorage, Overlay]:
    """Clusters 0 to 9 are a guest's, 10 to 19 adopted, all committed."""
    storage = storage or MemoryStorage(filled({}, image_size=SIZE).data)
    overlay = await open_storage(storage)
    for cluster in range(10):
        await overlay.write(cluster * CLUSTER, content("g", cluster), fill)
    fetched = bytearray(b"".join(content("b", cluster) for cluster in range(10, 20)))
    await overlay.adopt(10 * CLUSTER, fetched, len(fetched))
    await overlay.flush()
    return storage, overlay


def expected(cluster: int) -> bytes:
    return content("g" if cluster < 10 else "b", cluster)


async def test_what_was_cut_off_is_an_error_and_the_rest_is_not() -> None:
    storage, overlay = await half_full()
    del storage.bytes[-5 * CLUSTER :]
    assert [await found_in(overlay, cluster) for cluster in range(CLUSTERS)] == [
        *(expected(cluster) for cluster in range(15)),
        *[None] * 5,
        *(expected(cluster) for cluster in range(20, CLUSTERS)),
    ]


@pytest.mark.parametrize("how", ["in place", "new", "adopt", "adopt_zeros", "flush", "inspect", "detach", "close"])
async def test_nothing_is_written_to_a_cut_overlay(how: str) -> None:
    storage, overlay = await half_full()
    del storage.bytes[-5 * CLUSTER :]
    cut = bytes(storage.bytes)
    block = bytearray(content("g", 0))

    async def act() -> None:
        await (calls[how]() if how in calls else getattr(overlay, how)())
        await overlay.commit()  # an entry that is only in memory has not met the file
        await overlay.flush()

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "in place": lambda: overlay.write(0, block, fill),
        "new": lambda: overlay.write(30 * CLUSTER, block, fill),
        "adopt": lambda: overlay.adopt(30 * CLUSTER, block, CLUSTER),
        "adopt_zeros": lambda: overlay.adopt_zeros(30, 1),
    }
    with pytest.raises(QedfsError, match="was truncated to"):
        await act()
    assert storage.bytes == cut
    assert overlay.backing is not None
    with pytest.raises(QedfsError, match="was truncated to"):
        await overlay.inspect()


async def test_another_overlay_in_the_same_file_is_not_taken_for_ours() -> None:
    storage, overlay = await half_full()
    other, _ = await half_full()
    await overlay.inspect()
    storage.bytes[:] = other.bytes
    with pytest.raises(BadOverlay, match="was overwritten"):
        await overlay.inspect()
    assert overlay.damage is not None
    assert {await found_in(overlay, cluster) for cluster in range(20)} == {None}
    assert await found_in(overlay, 20) == expected(20)
    with pytest.raises(BadOverlay, match="was overwritten"):
        await overlay.write(0, b"x", fill)
    with pytest.raises(BadOverlay, match="was overwritten"):
        await overlay.detach()
    with pytest.raises(QedfsError, match="was overwritten"):
        await overlay.close()
    assert storage.bytes == other.bytes


async def test_a_close_tells_of_an_overwritten_overlay() -> None:
    """It may have been since the last look."""
    storage, overlay = await half_full()
    other, _ = await half_full()
    storage.bytes[:] = other.bytes
    with pytest.raises(BadOverlay, match="was overwritten"):
        await overlay.close()
    assert storage.closed


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("room", [True, False])
async def test_our_own_changes_of_the_header_are_no_damage(*, room: bool, seed: int | None) -> None:
    built = filled({}, image_size=SIZE, backing=b"n" * 900)
    if not room:
        built.replace(header_size=1)
    storage, overlay = await half_full(MemoryStorage(built.data, seed=seed))
    await overlay.inspect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.detach)
        for _ in range(20):
            await overlay.inspect()
    await overlay.inspect()
    await overlay.close()
    again = await open_storage(MemoryStorage(storage.bytes, writable=False))
    await again.inspect()


async def test_an_overlay_that_was_cut_before_is_not_complete() -> None:
    """Nothing of it is missing, and what it has lost may be in its backing."""
    storage, overlay = await half_full()
    await overlay.adopt_zeros(20, 20)
    await overlay.close()
    del storage.bytes[-5 * CLUSTER :]
    for writable in (True, True, False):
        storage = MemoryStorage(storage.bytes, writable=writable)
        overlay = await open_storage(storage)
        await overlay.count_missing()
        assert overlay.missing == 0
        assert overlay.damage is not None
        assert str(overlay.damage).startswith("5 clusters point to invalid places")
        if writable:
            with pytest.raises(BadOverlay, match="5 clusters"):
                await overlay.detach()
            # The next session finds the marks inside the file.
            storage.resize(len(storage.bytes) + 5 * CLUSTER)
            await overlay.close()


async def act(rng: random.Random, overlay: Overlay, model: list[str]) -> None:
    """Do something to the overlay; `model` has who may have written each cluster, the backing or the guest."""
    cluster = rng.randrange(CLUSTERS)
    match rng.randrange(5):
        case 0:
            # Begun is as good as done where an error may have come between.
            model[cluster] += "g"
            await overlay.write(cluster * CLUSTER, content("g", cluster), fill)
            model[cluster] = "g"
        case 1:
            block = bytearray(content("b", cluster))
            await overlay.adopt(cluster * CLUSTER, block, CLUSTER)
        case 2:
            await overlay.flush()
        case 3:
            await overlay.inspect()
        case 4:
            for missing in range(CLUSTERS):
                block = bytearray(content("b", missing))
                await overlay.adopt(missing * CLUSTER, block, CLUSTER)
            await overlay.detach()


async def judge(overlay: Overlay, model: list[str]) -> None:
    """Every cluster is of one who may have written it, or an error; and an error is never of a complete overlay."""
    for cluster, legal in enumerate(model):
        found = await found_in(overlay, cluster)
        assert found in (None, *(content(who, cluster) for who in legal)), (cluster, legal)
        assert found is not None or overlay.backing is not None or overlay.damage is not None


@settings(max_examples=sample(50, whole=200))
@given(st.randoms(use_true_random=False), st.integers(0, 30 * CLUSTER), st.booleans())
def test_a_cut_loses_and_never_invents(rng: random.Random, size: int, whole: bool) -> None:
    """Whatever is done before and after it, and at the next opening."""

    async def main() -> None:
        storage = MemoryStorage(filled({}, image_size=SIZE).data)
        overlay = await open_storage(storage)
        model = ["b"] * CLUSTERS
        for _ in range(rng.randrange(12)):
            await act(rng, overlay, model)
            if overlay.backing is None:
                break
        del storage.bytes[size - (size % CLUSTER if whole else 0) :]
        for _ in range(8):
            try:
                if overlay.backing is not None:
                    await act(rng, overlay, model)
            except QedfsError:
                assert overlay.damage is not None
            await judge(overlay, model)

    trio.run(main)
