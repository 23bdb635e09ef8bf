"""The references of an overlay: what nobody else uses may be given back, and what an earlier session has leaked."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from qedfs.errors import QedfsError
from qedfs.format.tables import ZERO
from qedfs.overlay import references as references_module
from qedfs.overlay.check import check
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import Built, filled

CLUSTER = 4096
DATA = {cluster: bytes([65 + cluster]) * CLUSTER for cluster in range(6)}


async def place_of(overlay: Overlay, cluster: int) -> int:
    (run,) = await overlay.map(cluster * CLUSTER, CLUSTER)
    return run.offset


async def content(overlay: Overlay, cluster: int) -> bytes:
    view = memoryview(bytearray(CLUSTER))
    await overlay.read_data(await place_of(overlay, cluster), view)
    return bytes(view)


def place_in(storage: MemoryStorage, cluster: int) -> int:
    return storage.bytes.find(DATA[cluster])


def sharing(built: Built, *, apart: int = 1) -> MemoryStorage:
    """An overlay in which another entry, this far from that of cluster 2, refers to the same place."""
    place = built.data.find(DATA[2])
    at = built.data.find(place.to_bytes(8, "little"))
    data = bytearray(built.data)
    data[at + apart * 8 : at + apart * 8 + 8] = place.to_bytes(8, "little")
    return MemoryStorage(data, name="disk")


async def discarded(overlay: Overlay, first: int, count: int) -> None:
    await overlay.discard(first, count)
    await overlay.flush()
    await overlay.give_space_back()


@pytest.mark.expect_log("is not given back")
@pytest.mark.parametrize("apart", [1, 100, 300], ids=["in the same piece", "in another", "past the image's end"])
@pytest.mark.parametrize("first", [True, False])
async def test_a_discard_does_not_free_what_another_entry_shows(
    apart: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references_module, "PIECE_CLUSTERS", 64)
    storage = sharing(filled(DATA), apart=apart)
    overlay = await open_storage(storage)
    gone, kept = (2, 2 + apart) if first else (2 + apart, 2)
    await discarded(overlay, gone, 1)
    assert await place_of(overlay, gone) == ZERO
    assert await content(overlay, kept) == DATA[2]
    await overlay.write(20 * CLUSTER, b"w" * CLUSTER, no_fill)
    assert await content(overlay, kept) == DATA[2]
    assert "two entries point to the cluster" in overlay._freed.references.problem


@pytest.mark.expect_log("is not given back")
async def test_two_discards_do_not_free_one_place_twice() -> None:
    overlay = await open_storage(sharing(filled(DATA)))
    await discarded(overlay, 2, 2)
    for cluster in (20, 21):
        await overlay.write(cluster * CLUSTER, bytes([cluster]) * CLUSTER, no_fill)
    assert [await content(overlay, cluster) for cluster in (20, 21)] == [bytes([c]) * CLUSTER for c in (20, 21)]


@pytest.mark.expect_log("is not given back")
async def test_a_discard_does_not_free_a_table() -> None:
    built = filled(DATA)
    data = bytearray(built.data)
    at = data.find(data.find(DATA[2]).to_bytes(8, "little"))
    table = at // CLUSTER * CLUSTER
    data[at : at + 8] = table.to_bytes(8, "little")
    overlay = await open_storage(MemoryStorage(data))
    await discarded(overlay, 2, 1)
    assert await content(overlay, 3) == DATA[3]
    assert "shares clusters" in overlay._freed.references.problem or "two entries" in overlay._freed.references.problem


@pytest.mark.expect_log("is not given back")
async def test_entries_that_a_discard_replaces_during_the_walk_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk has not come to the second entry when the first is discarded, and the other way round."""
    monkeypatch.setattr(references_module, "PIECE_CLUSTERS", 1)
    for turns in range(12):
        overlay = await open_storage(sharing(filled(DATA), apart=3))
        async with trio.open_nursery() as nursery:
            await overlay.discard(0, 1)
            await overlay.commit()
            nursery.start_soon(overlay.give_space_back)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            await overlay.discard(5, 1)
            await overlay.commit()
        await overlay.give_space_back()
        assert await content(overlay, 2) == DATA[2]


async def test_a_session_after_a_kill_gives_back_what_was_leaked(tmp_path: Path) -> None:
    """The discard was committed, but its space was not given back; a write had reached the file, but had no entry."""
    storage = MemoryStorage(filled(DATA).data, name="disk")
    killed = await open_storage(storage, journal_folder=tmp_path)
    await killed.write(9 * CLUSTER, b"9" * CLUSTER, no_fill)
    await killed.discard(2, 2)
    await killed.commit()
    freed = place_in(storage, 2)
    storage.bytes.extend(b"lost" * 1024)
    again = MemoryStorage(storage.bytes, name="disk")
    overlay = await open_storage(again, journal_folder=tmp_path)
    await overlay.give_space_back()
    assert place_in(again, 2) < 0
    assert b"lost" not in again.bytes
    assert [await content(overlay, cluster) for cluster in (0, 1, 4, 5)] == [DATA[c] for c in (0, 1, 4, 5)]
    assert await content(overlay, 9) == b"9" * CLUSTER
    await overlay.write(10 * CLUSTER, b"n" * CLUSTER, no_fill)
    assert await place_of(overlay, 10) == freed
    await overlay.close()
    left = MemoryStorage(again.bytes)
    assert check(left, read_header(left)[0]).corruptions == 0


async def test_what_a_killed_session_has_only_in_its_journal_is_no_leak(tmp_path: Path) -> None:
    storage = MemoryStorage(filled(DATA).data, name="disk")
    killed = await open_storage(storage, journal_folder=tmp_path)
    await killed.discard(2, 2)
    await killed.flush()
    await killed.give_space_back()
    await killed.write(9 * CLUSTER, b"9" * CLUSTER, no_fill)  # in the place of a discarded one
    overlay = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    await overlay.give_space_back()
    await overlay.write(10 * CLUSTER, b"n" * CLUSTER, no_fill)
    assert await content(overlay, 9) == b"9" * CLUSTER
    assert await content(overlay, 10) == b"n" * CLUSTER


async def test_without_a_kill_or_a_discard_no_table_is_walked() -> None:
    storage = MemoryStorage(filled(DATA).data)
    overlay = await open_storage(storage)
    before = storage.operations.copy()
    await overlay.give_space_back()
    assert storage.operations == before
    await overlay.close()


async def test_a_walk_that_is_cancelled_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references_module, "PIECE_CLUSTERS", 1)
    storage = MemoryStorage(filled(DATA).data)
    overlay = await open_storage(storage)
    await overlay.discard(2, 1)
    await overlay.flush()
    for turns in range(1, 40):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(overlay.give_space_back)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    await overlay.give_space_back()
    assert overlay._freed.references.problem == ""
    assert place_in(storage, 2) < 0


async def test_a_disk_that_fails_during_the_walk_delays_it() -> None:
    storage = MemoryStorage(filled(DATA).data, name="disk")
    killed = await open_storage(storage)
    await killed.discard(2, 1)
    left = MemoryStorage(storage.bytes, name="disk")
    left.read_now = lambda offset, view: False  # type: ignore[method-assign]
    overlay = await open_storage(left)
    left.fail("read", QedfsError("cannot read: Input/output error"), forever=True)
    await overlay.give_space_back()
    assert place_in(left, 2) >= 0
    left.mend()
    await overlay.give_space_back()
    assert place_in(left, 2) < 0
