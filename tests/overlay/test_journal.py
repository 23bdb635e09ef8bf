"""The session journal: what is read back, and what it does when its tmpfs is full."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from qedfs.errors import QedfsError, ReadOnlyOverlay
from qedfs.host.runtime import RuntimeFolder
from qedfs.overlay.journal import Journal, Pair, moved_to, read_journal
from qedfs.overlay.open import open_storage
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import empty

T = TypeVar("T")

CLUSTER = 4096
SESSION = "5" * 32
DEVICE = 77
HEADER_SIZE = 128


def created(folder: Path) -> Journal:
    return Journal.create(folder, "disk", SESSION, DEVICE)


def place(folder: Path) -> Path:
    return folder / f"disk-{SESSION}"


def read(folder: Path, *, device: int = DEVICE, locked: bool = True) -> list[Pair]:
    """The pairs that the next process finds; none also where it finds no journal."""
    try:
        left = read_journal(RuntimeFolder(folder), "disk", SESSION, device, locked=locked)
    except FileNotFoundError:
        return []
    return list(left.pairs) if left else []


def test_entries_are_read_back_in_order(tmp_path: Path) -> None:
    journal = created(tmp_path)
    journal.append([(1, 4096), (2, 8192)])
    journal.append([(1, 12288)])
    assert read(tmp_path) == [(1, 4096), (2, 8192), (1, 12288)]
    journal.landed(journal.end)
    assert read(tmp_path) == []
    journal.append([(3, 4096)])
    landing = journal.end
    journal.append([(4, 8192), (5, 12288)])
    journal.landed(landing)
    journal.append([(6, 16384)])
    assert read(tmp_path) == [(4, 8192), (5, 12288), (6, 16384)]
    left = read_journal(RuntimeFolder(tmp_path), "disk", SESSION, DEVICE, locked=True)
    assert left is not None
    assert left.witness == (3, 4096)
    journal.close(remove=True)
    assert read(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", range(1, 16))
def test_a_torn_entry_is_left_out(tmp_path: Path, lost: int) -> None:
    journal = created(tmp_path)
    journal.append([(1, 4096), (2, 8192)])
    journal.close(remove=False)
    path = place(tmp_path)
    path.write_bytes(path.read_bytes()[:-lost])
    assert read(tmp_path) == [(1, 4096)]


@pytest.mark.parametrize("at", [0, 7, 8, 20, 50])
def test_a_journal_of_another_boot_or_session_is_void_and_of_another_version_unread(tmp_path: Path, at: int) -> None:
    journal = created(tmp_path)
    journal.append([(1, 4096)])
    journal.close(remove=False)
    path = place(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x80  # no version that is known
    path.write_bytes(data)
    if at < 8:
        with pytest.raises(OSError, match="another version"):
            read(tmp_path)
    else:
        assert read(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 127, 128])
def test_a_journal_without_entries_is_empty(tmp_path: Path, size: int) -> None:
    created(tmp_path).close(remove=False)
    os.truncate(place(tmp_path), size)
    assert read(tmp_path) == []


@pytest.mark.parametrize(("device", "locked"), [(DEVICE, False), (DEVICE + 1, True), (DEVICE + 1, False)])
def test_the_journal_of_a_living_process_is_not_read(tmp_path: Path, device: int, locked: bool) -> None:
    """The locks of the overlay vouch for the one device only: elsewhere it is a copy, the original may be in use."""
    journal = created(tmp_path)
    journal.append([(1, 4096)])
    assert read(tmp_path, device=device, locked=locked) == []
    assert read(tmp_path) == [(1, 4096)]
    journal.close(remove=False)
    assert read(tmp_path, device=device, locked=locked) == [(1, 4096)]


def test_the_journal_of_another_device_is_not_removed(tmp_path: Path) -> None:
    created(tmp_path).close(remove=False)
    for device, kept in ((DEVICE + 1, True), (DEVICE, False)):
        left = read_journal(RuntimeFolder(tmp_path), "disk", SESSION, device, locked=True)
        assert left is not None
        left.remove()
        assert place(tmp_path).exists() == kept


def test_a_kill_while_entries_are_forgotten_leaves_the_later_ones(tmp_path: Path) -> None:
    """Looked at before and behind every call that leaves Python."""
    journal = created(tmp_path)
    journal.append([(1, 4096), (2, 8192)])
    landing = journal.end
    journal.append([(3, 12288), (4, 16384)])
    states: list[list[Pair]] = []

    def look(frame: object, event: str, arg: object) -> None:
        if event in ("c_call", "c_return"):
            states.append(read(tmp_path))

    sys.setprofile(look)
    try:
        journal.landed(landing)
    finally:
        sys.setprofile(None)
    later = [(3, 12288), (4, 16384)]
    before = [(1, 4096), (2, 8192), *later]
    assert len(states) > 20
    assert states == [before] * states.count(before) + [later] * states.count(later)
    assert read(tmp_path) == later


def test_a_journal_that_is_voided_while_it_forgets_stays_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier fails in a worker thread while the event loop puts the new file in place."""
    for moment in ("write", "replace"):
        journal = created(tmp_path)
        journal.append([(1, 4096)])
        landing = journal.end
        journal.append([(2, 8192)])
        plain = getattr(os, moment)

        def voided(*arguments: object, journal: Journal = journal, plain: Callable[..., object] = plain) -> object:
            journal.void()
            return plain(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, moment, voided)
            journal.landed(landing)
        with pytest.raises(FileNotFoundError):
            journal.append([(3, 12288)])
        assert os.listdir(tmp_path) == []


def test_a_void_journal_comes_to_its_place_at_no_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the replacement and a second unlinking would revive it."""
    journal = created(tmp_path)
    journal.append([(1, 4096)])
    landing = journal.end
    journal.append([(2, 8192)])
    journal.void()
    moments: list[str] = []
    with monkeypatch.context() as patched:
        for moment in ("write", "replace"):
            patched.setattr(os, moment, lambda *_, moment=moment: moments.append(moment))
        journal.landed(landing)
    assert moments == []
    assert os.listdir(tmp_path) == []


async def test_the_journal_of_a_busy_writer_does_not_grow(tmp_path: Path) -> None:
    """There is always an entry that waits: one is written during each commit."""
    storage = MemoryStorage(empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    clusters = iter(range(200))
    plain = storage.in_thread

    async def beside(function: Callable[[], T]) -> T:
        await overlay.write(next(clusters) * CLUSTER, b"a" * CLUSTER, no_fill)
        return await plain(function)

    await overlay.write(next(clusters) * CLUSTER, b"a" * CLUSTER, no_fill)
    storage.in_thread = beside  # type: ignore[method-assign]
    for _ in range(50):
        await overlay.commit()
        (journal,) = os.scandir(tmp_path)
        assert journal.stat().st_size == HEADER_SIZE + 16
    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    assert [run.size for run in await again.map(0, 60 * CLUSTER) if run.offset > 1] == [51 * CLUSTER]


async def test_a_killed_session_is_replayed(tmp_path: Path) -> None:
    storage = MemoryStorage(empty(image_size=4 << 20, backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.write(0, b"a" * CLUSTER, no_fill)
    await overlay.write(2 << 20, b"b" * 512, no_fill)
    assert overlay.commit_pending

    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    assert [run.size for run in await again.map(0, CLUSTER) if run.offset > 1] == [CLUSTER]
    assert [run.size for run in await again.map(2 << 20, CLUSTER) if run.offset > 1] == [CLUSTER]
    assert not again.committer.pending


class SmallTmpfs:
    """`os.pwrite` on a file system that has room for `room` more bytes: a short write, then ENOSPC."""

    def __init__(self, room: int) -> None:
        self._room = room

    def __call__(self, fd: int, data: bytes, offset: int) -> int:
        count = min(len(data), self._room)
        self._room -= count
        if not count:
            raise OSError(28, "No space left on device")
        written: int = os.pwritev(fd, [data[:count]], offset)
        return written


def test_what_a_full_tmpfs_has_taken_of_some_entries_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.create(tmp_path, "disk", "session", 1)
    journal.append([(1, CLUSTER)])
    before = journal.path.read_bytes()
    monkeypatch.setattr("qedfs.overlay.journal.os.pwrite", SmallTmpfs(32))
    with pytest.raises(OSError, match="No space left"):
        journal.append([(cluster, moved_to(cluster * CLUSTER)) for cluster in (2, 3, 4)])
    assert journal.path.read_bytes() == before
    journal.close(remove=True)


@pytest.mark.expect_log("No space left on device; writes to new clusters wait for a commit")
@pytest.mark.parametrize("room", [0, 16, 32])
async def test_a_full_tmpfs_loses_no_answered_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """The write of three clusters finds room for some of its entries only; it must be committed before its answer."""
    storage = MemoryStorage(empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.write(8 * CLUSTER, b"b" * CLUSTER, no_fill)
    monkeypatch.setattr("qedfs.overlay.journal.os.pwrite", SmallTmpfs(room))
    await overlay.write(0, b"a" * 3 * CLUSTER, no_fill)
    await overlay.write(4 * CLUSTER, b"c" * CLUSTER, no_fill)

    assert not os.listdir(tmp_path)  # all of it is committed, so it takes no room

    again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
    for cluster in (0, 1, 2, 4, 8):
        assert (await again.map(cluster * CLUSTER, CLUSTER))[0].offset > 1


async def test_a_journal_that_was_removed_loses_no_answered_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a logout $XDG_RUNTIME_DIR goes, and RemoveIPC empties /dev/shm; the mount goes on."""
    folder = tmp_path / "journal"
    folder.mkdir()
    storage = MemoryStorage(empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=folder)
    await overlay.write(8 * CLUSTER, b"b" * CLUSTER, no_fill)
    shutil.rmtree(folder)
    for cluster in (0, 1):
        await overlay.write(cluster * CLUSTER, b"a" * CLUSTER, no_fill)
        again = await open_storage(MemoryStorage(storage.bytes, name="disk"), journal_folder=tmp_path)
        for written in (8, *range(cluster + 1)):
            assert (await again.map(written * CLUSTER, CLUSTER))[0].offset > 1
    assert ["No such file" in text for text in caplog.messages] == [True]
    await overlay.close()


@pytest.mark.expect_log("No space left on device; writes to new clusters wait for a commit")
async def test_a_failed_barrier_voids_a_journal_that_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage(empty(backing=b"").data, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path)
    await overlay.write(CLUSTER, b"b" * CLUSTER, no_fill)
    monkeypatch.setattr("qedfs.overlay.journal.os.pwrite", SmallTmpfs(0))
    storage.fail("barrier", QedfsError("EIO"))
    with pytest.raises(ReadOnlyOverlay):
        await overlay.write(0, b"a" * CLUSTER, no_fill)
    assert os.listdir(tmp_path) == []
