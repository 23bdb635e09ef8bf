"""Another size for an image: what is new reads as zeros whatever the file has there, and after a cut at any moment."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio

from qedfs.errors import NoSpace, QedfsError, UsageError
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.check import Report, check
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage, RecordingStorage
from tests.overlay.cuts import Disk
from tests.overlay.guest import no_fill
from tests.overlay.images import SPAN, Built, filled

CLUSTER = 4096
Clusters = dict[int, bytes | int]
OLD = 5 * CLUSTER + 1536  # ends inside a cluster
STALE = b"\xee" * CLUSTER  # what another program has left in the file
GUEST: Clusters = {0: b"a" * CLUSTER, 3: ZERO, 5: STALE}


def dirty(clusters: Clusters | None = None, *, backing: bytes = b"", image_size: int = OLD) -> Built:
    """An overlay with bytes after the image's end, in the last cluster, in entries of its table and in L1."""
    stale: Clusters = {6: STALE, 9: ZERO, 200: STALE, 513: STALE, 1500: STALE}
    built = filled({**(GUEST if clusters is None else clusters), **stale}, image_size=3 * SPAN, backing=backing)
    built.replace(geometry=built.header.geometry.__class__(CLUSTER, 1, image_size))
    return built


async def shown(overlay: Overlay) -> bytes:
    """The bytes of the image; what is missing reads as zeros."""
    image = bytearray(overlay.image_size)
    for run in await overlay.map(0, overlay.image_size):
        if run.offset > ZERO:
            await overlay.read_data(run.offset, memoryview(image)[run.pos : run.pos + run.size])
    return bytes(image)


def checked(storage: MemoryStorage) -> tuple[int, Report]:
    """The size of the image according to the file, which is sound, and the report of its check."""
    again = MemoryStorage(bytes(storage.bytes), writable=False)
    header, _ = read_header(again)
    report = check(again, header)
    assert report.corruptions == 0
    return header.geometry.image_size, report


async def whole(storage: MemoryStorage) -> bytes:
    """What the next session shows of this file, which is sound."""
    checked(storage)
    return await shown(await open_storage(MemoryStorage(bytes(storage.bytes), writable=False)))


@pytest.mark.parametrize("new", [OLD + 512, 6 * CLUSTER, 7 * CLUSTER, SPAN, SPAN + CLUSTER, 2 * SPAN + 512, 3 * SPAN])
async def test_what_is_new_reads_as_zeros(new: int) -> None:
    storage = MemoryStorage(dirty().data)
    overlay = await open_storage(storage)
    before = await shown(overlay)
    assert STALE[:1536] in before
    await overlay.grow(new)
    assert overlay.image_size == new
    assert await shown(overlay) == before.ljust(new, b"\0")
    assert await whole(storage) == before.ljust(new, b"\0")
    await overlay.write(new - 512, b"z" * 512, no_fill)
    await overlay.close()
    assert await whole(storage) == before[: new - 512].ljust(new - 512, b"\0") + b"z" * 512


async def test_an_empty_image_grows() -> None:
    overlay = await open_storage(MemoryStorage(filled({}, image_size=0, backing=b"").data))
    await overlay.count_missing()
    await overlay.grow(SPAN)
    await overlay.count_missing()
    assert overlay.missing == 512


@pytest.mark.parametrize("new", [OLD, OLD + 512, 6 * CLUSTER, 300 * CLUSTER, SPAN + 512, 3 * SPAN])
@pytest.mark.parametrize("counted", ["before", "during", "not yet"])
async def test_the_missing_clusters_are_counted_right(new: int, counted: str) -> None:
    storage = MemoryStorage(dirty({0: GUEST[0], 4: ZERO}, backing=b"base.raw").data)
    overlay = await open_storage(storage)
    if counted == "before":
        await overlay.count_missing()
        assert overlay.missing == 4
    async with trio.open_nursery() as nursery:
        if counted == "during":
            nursery.start_soon(overlay.count_missing)
        await overlay.grow(new)
    await overlay.count_missing()
    again = await open_storage(MemoryStorage(bytes(storage.bytes), writable=False))
    await again.count_missing()
    assert overlay.missing == again.missing
    clusters = [run for run in await overlay.map(0, new) if run.offset == MISSING]
    assert overlay.missing == sum(-(-run.size // CLUSTER) for run in clusters)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("new", [6 * CLUSTER, 2 * SPAN + 512])
async def test_after_a_cut_it_has_one_of_both_sizes_and_no_strange_byte(new: int, seed: int) -> None:
    storage = RecordingStorage(dirty().data)
    overlay = await open_storage(storage)
    before = await shown(overlay)
    begun = len(storage.log)
    await overlay.grow(new)
    done = len(storage.log)
    await overlay.write(new - 1024, b"g" * 512, no_fill)  # past the old end
    await overlay.flush()
    after = before.ljust(new, b"\0")
    written = after[: new - 1024] + b"g" * 512 + bytes(512)
    disk, rng, sizes = Disk(storage.start, storage.log), random.Random(seed), set()
    for position in range(begun, len(storage.log) + 1):
        disk.advance(position)
        for cut in disk.cuts(10, rng):
            found = await whole(MemoryStorage(disk.build(cut)))
            sizes.add(len(found))
            legal = [after, written] if position >= done else [before, after]
            assert found in legal
    assert sizes == {OLD, new}
    assert found == written


@pytest.mark.parametrize("kind", ["write", "barrier", "read"])
async def test_a_disk_that_fails_leaves_the_old_size_or_the_new_one(kind: str) -> None:
    for nth in range(1, 9):
        storage = MemoryStorage(dirty().data)
        overlay = await open_storage(storage)
        before = await shown(overlay)
        storage.fail(kind, QedfsError("the disk is broken"), nth=nth, wrote=0)
        with contextlib.suppress(QedfsError):
            await overlay.grow(SPAN + 512)
        assert len(await shown(overlay)) == overlay.image_size
        storage.mend()
        assert await whole(storage) in (before, before.ljust(SPAN + 512, b"\0"))


async def test_a_full_disk_costs_nothing_and_the_next_try_succeeds() -> None:
    storage = MemoryStorage(dirty().data)
    overlay = await open_storage(storage)
    before = await shown(overlay)
    storage.fail("write", NoSpace("no space left"), forever=True, wrote=0)
    with pytest.raises(NoSpace):
        await overlay.grow(SPAN)
    assert (overlay.image_size, overlay.failure, await shown(overlay)) == (OLD, None, before)
    storage.mend()
    await overlay.grow(SPAN)
    assert await whole(storage) == before.ljust(SPAN, b"\0")


@pytest.mark.parametrize("seed", range(6))
async def test_guests_write_and_discard_at_the_old_end_meanwhile(seed: int) -> None:
    storage = MemoryStorage(dirty().data, seed=seed)
    overlay = await open_storage(storage)
    model = bytearray((await shown(overlay)).ljust(2 * SPAN, b"\0"))
    rng = random.Random(seed)

    async def write() -> None:
        for number in range(12):
            end = rng.choice((OLD, OLD - 512, overlay.image_size))
            size = rng.choice((512, 1536, CLUSTER, 5000))
            data = bytes([97 + number]) * size
            if rng.random() < 0.3:
                await overlay.discard(5, 1)
                model[5 * CLUSTER : 6 * CLUSTER] = bytes(CLUSTER)
            await overlay.write(end - size, data, no_fill)
            model[end - size : end] = data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for new in (OLD + 512, 6 * CLUSTER - 512, SPAN, 2 * SPAN):
            await overlay.grow(new)
            await trio.lowlevel.checkpoint()
    assert await shown(overlay) == model
    await overlay.close()
    assert await whole(storage) == model


@pytest.mark.parametrize(
    ("size", "text"),
    [(OLD - 512, "less than"), (OLD + 100, "multiple of 512"), (SPAN * 512 + 512, "can map, which is 1073741824")],
)
async def test_sizes_that_are_refused(size: int, text: str) -> None:
    overlay = await open_storage(MemoryStorage(dirty().data))
    with pytest.raises(UsageError, match=text):
        await overlay.grow(size)
    assert overlay.image_size == OLD


# Shrink.


@pytest.mark.parametrize("new", [0, 512, CLUSTER, 3 * CLUSTER, SPAN, SPAN + 512])
async def test_zeros_and_missing_parts_are_cut_off_and_do_not_come_back(new: int) -> None:
    clusters: Clusters = {0: b"a" * min(new, CLUSTER), 1: ZERO, 600: bytes(CLUSTER), 601: ZERO, 1200: ZERO}
    storage = MemoryStorage(filled(clusters, image_size=3 * SPAN, backing=b"base.raw").data)
    overlay = await open_storage(storage)
    await overlay.shrink(new)
    await overlay.close()
    # Another program that enlarges the image finds no entries there.
    size, report = checked(storage)
    assert (size, report.tables) == (new, -(-new // SPAN))
    assert report.zero == sum(cluster * CLUSTER < new for cluster in (1, 601, 1200))
    again = await open_storage(MemoryStorage(storage.bytes))
    await again.grow(3 * SPAN)
    assert await shown(again) == (b"a" * min(new, CLUSTER)).ljust(3 * SPAN, b"\0")


@pytest.mark.parametrize("new", [0, 512, 600 * CLUSTER, 600 * CLUSTER + 1024])
async def test_data_is_never_cut_off(new: int) -> None:
    clusters: Clusters = {0: b"a" * 1024, 600: b"b" * 2048}
    storage = MemoryStorage(filled(clusters, image_size=3 * SPAN).data)
    overlay = await open_storage(storage)
    with pytest.raises(UsageError, match=f"data past {new} bytes, in the cluster at"):
        await overlay.shrink(new)
    await overlay.close()
    assert checked(storage)[0] == 3 * SPAN


async def test_a_shrink_that_was_cut_off_shows_nothing_else_and_can_be_repeated() -> None:
    storage = RecordingStorage(filled({0: b"a", 3: ZERO, 700: ZERO}, image_size=3 * SPAN).data)
    overlay = await open_storage(storage)
    begun, new = len(storage.log), 2 * CLUSTER
    await overlay.shrink(new)
    disk, rng, sizes = Disk(storage.start, storage.log), random.Random(2), set()
    for position in range(begun, len(storage.log) + 1):
        disk.advance(position)
        for cut in disk.cuts(10, rng):
            left = MemoryStorage(disk.build(cut))
            again = await open_storage(left)
            sizes.add(again.image_size)
            if again.image_size > new:
                # A zero cluster over a backing must not have become missing.
                assert [run.offset for run in await again.map(3 * CLUSTER, CLUSTER)] == [ZERO]
                assert [run.offset for run in await again.map(700 * CLUSTER, CLUSTER)] == [ZERO]
            await again.shrink(new)
            await again.close()
            _, report = checked(left)
            assert (report.zero, report.tables) == (0, 1)
    assert sizes == {new, 3 * SPAN}


@pytest.mark.expect_log("is not given back: L1 entries lie past the end of the image")
async def test_no_space_is_given_back_while_entries_past_the_end_may_need_it() -> None:
    storage = MemoryStorage(dirty().data)
    overlay = await open_storage(storage)
    await overlay.discard(0, 1)
    await overlay.flush()
    await overlay.give_space_back()
    assert storage.operations["punch"] == 0
    await overlay.close()
