"""An overlay that was cut, as by a copy that met a full disk: what it lost is an error, never somebody else's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.errors import BadOverlay, NoSpace
from qedfs.overlay.check import check, repair
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from tests.fakes.storage import BarrierBegun, BarrierEnded, Entry, MemoryStorage, RecordingStorage, Resized, Written
from tests.overlay.guest import no_fill
from tests.overlay.images import filled

CLUSTER = 4096
SPAN = 512 * CLUSTER  # of one table


async def states(overlay: Overlay, *clusters: int) -> list[bytes | int | None]:
    """The first byte of each cluster, its entry if it has no data, None if it is refused."""
    found: list[bytes | int | None] = []
    for cluster in clusters:
        try:
            (run,) = await overlay.map(cluster * CLUSTER, CLUSTER)
        except BadOverlay:
            found.append(None)
            continue
        byte = bytearray(1)
        if run.offset > 1:
            await overlay.read_data(run.offset, memoryview(byte))
        found.append(bytes(byte) if run.offset > 1 else run.offset)
    return found


def is_record(entry: Entry) -> bool:
    """Whether it is a write of the private record, which a guest's first write brings with it."""
    return isinstance(entry, Written) and entry.data.startswith(b"qedfs\0")


def cut_at(lost: int) -> MemoryStorage:
    """Clusters 0 to 3, and one in another table, whose data lie in this order; `lost` bytes are gone."""
    whole = filled({0: b"0", 1: b"1", 2: b"2", 3: b"3", 513: b"5"}, backing=b"", image_size=4 * SPAN)
    return MemoryStorage(whole.data[:-lost])


@pytest.mark.parametrize("lost", [3 * CLUSTER, 3 * CLUSTER - 100, 2 * CLUSTER + 1])
async def test_a_cluster_behind_the_end_stays_bad(lost: int) -> None:
    """Also when the file has grown over it, when its slice has left the memory, and in the next session."""
    storage = cut_at(lost)
    expected = [b"0", b"1", None, None, None]
    assert await states(await open_storage(MemoryStorage(storage.bytes, writable=False)), 0, 1, 2, 3, 513) == expected

    overlay = await open_storage(storage)
    overlay.tables._cache_slices = 1
    await overlay.write(1024 * CLUSTER, b"other" * CLUSTER * 2, no_fill)
    assert await states(overlay, 0, 1, 2, 3, 513) == expected
    await overlay.flush()
    await overlay.map(1024 * CLUSTER, 1)
    assert not overlay.clusters.is_loaded(0, 1)
    assert await states(overlay, 0, 1, 2, 3, 513) == expected
    with pytest.raises(BadOverlay, match="cluster 2 points to"):
        await overlay.write(2 * CLUSTER, b"g" * CLUSTER, no_fill)
    await overlay.close()

    assert await states(await open_storage(MemoryStorage(storage.bytes)), 0, 1, 2, 3, 513) == expected


async def test_counting_marks_what_nobody_else_reads() -> None:
    """The next session finds the file grown: a guest's write to a lost cluster would land in somebody else's."""
    storage = cut_at(3 * CLUSTER)
    overlay = await open_storage(storage)
    overlay.tables._cache_slices = 1
    await overlay.count_missing()
    assert overlay.missing == 4 * SPAN // CLUSTER - 5
    await overlay.write(1024 * CLUSTER, b"other" * CLUSTER * 2, no_fill)
    await overlay.close()

    again = await open_storage(MemoryStorage(storage.bytes))
    assert await states(again, 0, 1, 2, 3, 513, 1024) == [b"0", b"1", None, None, None, b"o"]


async def test_counting_goes_on_behind_a_table_that_is_gone() -> None:
    """It fails all the same, each time."""
    whole = filled({512: b"1", 513: b"2", 514: b"3", 0: 0}, backing=b"", image_size=4 * SPAN)
    # The first table lies where the last cluster does.
    whole.put_u64(whole.header.l1_table_offset, len(whole.data) - CLUSTER)
    storage = MemoryStorage(whole.data[: -2 * CLUSTER])
    overlay = await open_storage(storage)
    for _ in range(2):
        with pytest.raises(BadOverlay, match="L2 table"):
            await overlay.count_missing()
    assert overlay.missing is None
    await overlay.write(1024 * CLUSTER, b"other" * CLUSTER * 2, no_fill)
    await overlay.close()
    assert await states(await open_storage(MemoryStorage(storage.bytes)), 0, 512, 513, 514) == [None, b"1", None, None]


async def test_counting_brings_no_sound_slice_into_memory() -> None:
    storage = MemoryStorage(filled({0: b"0", 513: b"5"}, image_size=4 * SPAN).data)
    overlay = await open_storage(storage)
    await overlay.count_missing()
    assert not any(overlay.clusters.is_loaded(cluster * CLUSTER, 1) for cluster in (0, 513))


async def test_what_this_session_wrote_behind_the_end_of_then_is_good() -> None:
    """Its slice is read again, for the first time from the file."""
    storage = cut_at(3 * CLUSTER)
    overlay = await open_storage(storage)
    overlay.tables._cache_slices = 1
    await overlay.write(1024 * CLUSTER, b"new", no_fill)
    await overlay.flush()
    await overlay.map(0, 1)
    assert not overlay.clusters.is_loaded(1024 * CLUSTER, 1)
    assert await states(overlay, 1024, 1025) == [b"n", 0]


@pytest.mark.parametrize("left", [0, 100, CLUSTER - 1])
async def test_a_table_behind_the_end_stays_bad(left: int) -> None:
    """Otherwise what a guest writes would be taken for entries."""
    whole = filled({0: 0, 512: 0, 1024: 0}, backing=b"", image_size=4 * SPAN)
    storage = MemoryStorage(whole.data[: -2 * CLUSTER + left])
    overlay = await open_storage(storage)
    entry = (0x3000).to_bytes(8, "little")
    await overlay.write(0, entry * 1536 * 2, no_fill)
    await overlay.flush()
    assert await states(overlay, 512, 1024) == [None, None]
    with pytest.raises(BadOverlay, match=r"L2 table at .* is not inside the file"):
        await overlay.write(SPAN, b"g", no_fill)
    await overlay.close()

    again = await open_storage(MemoryStorage(storage.bytes))
    assert await states(again, 0, 512, 1024) == [b"\0", None, None]


@pytest.mark.parametrize("room", [True, False])
async def test_the_file_grows_behind_a_barrier_for_the_marks_of_tables(*, room: bool) -> None:
    """Also in an overlay without room for a record, whose session begins without a barrier."""
    whole = filled({0: 0, 512: 0, 1024: 0}, backing=b"n" * 2000, image_size=4 * SPAN)
    if not room:
        whole.replace(header_size=1)
    storage = RecordingStorage(whole.data[: -2 * CLUSTER])
    size = len(storage.bytes)
    overlay = await open_storage(storage)
    assert bool(overlay.record.session) == room
    await overlay.write(0, (0x3000).to_bytes(8, "little") * 512, no_fill)
    marked = storage.log.index(Written(0x2000, bytes(storage.bytes[0x2000:0x2020])))
    grown = next(at for at, entry in enumerate(storage.log) if isinstance(entry, Written) and entry.offset >= size)
    assert any(isinstance(entry, BarrierBegun) for entry in storage.log[marked:grown])


async def test_a_cut_overlay_can_be_repaired_after_a_session() -> None:
    storage = cut_at(3 * CLUSTER)
    overlay = await open_storage(storage)
    await overlay.write(1024 * CLUSTER, b"other" * CLUSTER, no_fill)
    assert await states(overlay, 2, 513) == [None, None]
    await overlay.close()

    closed = MemoryStorage(storage.bytes)
    header = read_header(closed)[0]
    assert check(closed, header).corruptions == 3
    assert repair(closed, header).repaired == 3
    assert await states(await open_storage(closed), 0, 2, 3, 513, 1024) == [b"0", 0, 0, 0, b"o"]


async def test_a_whole_overlay_is_left_as_it_is() -> None:
    storage = MemoryStorage(filled({0: b"0", 513: b"5"}, image_size=4 * SPAN).data)
    overlay = await open_storage(storage)
    assert await states(overlay, 0, 513) == [b"0", b"5"]
    assert not overlay.commit_pending


async def test_a_kill_before_the_commit_keeps_the_marks(tmp_path: Path) -> None:
    """A write that only the journal knows of has made the file longer."""
    storage = MemoryStorage(cut_at(3 * CLUSTER).bytes, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    expected = [b"0", b"1", None, None, None]
    assert await states(overlay, 0, 1, 2, 3, 513) == expected
    assert not overlay.commit_pending
    await overlay.write(1024 * CLUSTER, b"other" * CLUSTER * 2, no_fill)
    assert overlay.tables.dirty

    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    assert await states(again, 0, 1, 2, 3, 513, 1024) == [*expected, b"o"]


@pytest.mark.parametrize("how", ["write", "adopt", "adopt_zeros"])
async def test_the_file_grows_behind_a_barrier_for_the_marks(how: str) -> None:
    """One, and none where there are no marks; whoever grows it finds them itself or somebody else has."""
    for found, data in ((1, cut_at(3 * CLUSTER).bytes), (0, filled({0: b"0"}, image_size=4 * SPAN).data)):
        storage = RecordingStorage(data)
        overlay = await open_storage(storage)
        begun, size = len(storage.log), len(storage.bytes)
        block = bytearray(b"new!" * (CLUSTER // 4))
        arguments = {"write": (4 * CLUSTER, block, no_fill), "adopt": (4 * CLUSTER, block, CLUSTER)}
        await getattr(overlay, how)(*arguments.get(how, (4, 1)))
        await overlay.write(1024 * CLUSTER, block, no_fill)
        grown = next(
            at
            for at, entry in enumerate(storage.log[begun:])
            if isinstance(entry, Resized) or (isinstance(entry, Written) and entry.offset >= size)
        )
        kinds = [type(entry) for entry in storage.log[begun : begun + grown] if not is_record(entry)]
        assert kinds == [Written, BarrierBegun, BarrierEnded] * found


async def test_marks_that_cannot_be_written_wait_for_the_next_group() -> None:
    storage = cut_at(3 * CLUSTER)
    overlay = await open_storage(storage)
    storage.fail("write", NoSpace("full"), wrote=0)
    assert await states(overlay, 0, 2) == [b"0", None]
    assert overlay.commit_pending
    await overlay.flush()
    assert await states(await open_storage(MemoryStorage(storage.bytes)), 0, 2, 3) == [b"0", None, None]


async def test_nothing_is_allocated_before_marks_that_could_not_be_written() -> None:
    """A file system may need room to overwrite. A kill before the next group would leave the growth alone."""
    storage = RecordingStorage(cut_at(3 * CLUSTER).bytes)
    overlay = await open_storage(storage)
    begun, size = len(storage.log), len(storage.bytes)
    storage.fail("write", NoSpace("full"), forever=True, wrote=0)
    assert await states(overlay, 0, 2) == [b"0", None]
    with pytest.raises(NoSpace):
        await overlay.write(1024 * CLUSTER, b"other" * CLUSTER, no_fill)
    assert (storage.log[begun:], len(storage.bytes)) == ([], size)

    storage.mend()
    await overlay.write(1024 * CLUSTER, b"other" * CLUSTER, no_fill)
    kinds = [type(entry) for entry in storage.log[begun:] if not is_record(entry)]
    assert kinds[:3] == [Written, BarrierBegun, BarrierEnded]
    assert await states(await open_storage(MemoryStorage(storage.bytes)), 0, 2, 3) == [b"0", None, None]


async def test_a_cut_table_does_not_keep_a_full_disk_from_being_read() -> None:
    storage = RecordingStorage(filled({0: 0, 512: 0, 1024: 0}, backing=b"", image_size=4 * SPAN).data[: -2 * CLUSTER])
    storage.fail("write", NoSpace("full"), forever=True, wrote=0)
    overlay = await open_storage(storage)
    assert await states(overlay, 0, 512, 1024) == [0, None, None]

    storage.mend()
    await overlay.write(0, b"g" * CLUSTER, no_fill)
    first = next(entry for entry in storage.log if isinstance(entry, Written) and entry.offset not in (0, 0x1A00))
    assert first.offset == overlay.geometry.cluster_size * 2  # L1
    assert await states(await open_storage(MemoryStorage(storage.bytes)), 512, 1024) == [None, None]
