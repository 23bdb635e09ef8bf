"""The contract of the `Storage` port, held against the real file (on a disk and on a tmpfs) and against its twins."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from qedfs.errors import BadOverlay, NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.geometry import MAX_FILE_SIZE
from qedfs.overlay.length import Length
from qedfs.overlay.storage import FileExtent, FileStorage, Storage
from tests.fakes.storage import BarrierBegun, BarrierEnded, Marked, MemoryStorage, RecordingStorage, Resized, Written

Opener = Callable[[bytes], Storage]


@pytest.fixture(params=["disk", "tmpfs", "memory", "memory-seeded", "recording"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens a file with the given bytes, one way or another."""
    opened: list[Storage] = []
    shm = Path("/dev/shm", f"qedfs-test-{random.randrange(1 << 60):x}")
    path = {"disk": tmp_path / "file", "tmpfs": shm}.get(request.param)

    def open_with(data: bytes) -> Storage:
        if path is not None:
            path.write_bytes(data)
            opened.append(FileStorage.open(str(path), writable=True))
        elif request.param == "recording":
            opened.append(RecordingStorage(data, name="r", seed=2))
        else:
            opened.append(MemoryStorage(data, name="m", seed=1 if request.param == "memory-seeded" else None))
        return opened[-1]

    yield open_with
    for storage in opened:
        storage.close()
    shm.unlink(missing_ok=True)


def read(storage: Storage, offset: int, size: int) -> bytes:
    data = bytearray(b"?" * size)
    storage.read(offset, memoryview(data))
    return bytes(data)


def test_bytes_come_back(opener: Opener) -> None:
    storage = opener(b"0123456789")
    assert storage.writable
    assert (storage.size(), read(storage, 2, 5)) == (10, b"23456")
    storage.write(3, [b"ab", bytearray(b"c"), b"", memoryview(b"de")])
    assert read(storage, 0, 10) == b"012abcde89"


def test_past_the_end_there_are_zeros(opener: Opener) -> None:
    storage = opener(b"0123")
    assert read(storage, 2, 6) == b"23\0\0\0\0"
    assert read(storage, 100, 3) == bytes(3)
    storage.write(6, [b"x"])
    assert (storage.size(), read(storage, 0, 8)) == (7, b"0123\0\0x\0")


def test_growing_brings_zeros_also_where_something_was(opener: Opener) -> None:
    storage = opener(b"01234567")
    storage.resize(4)
    storage.resize(8)
    assert (storage.size(), read(storage, 0, 8)) == (8, b"0123\0\0\0\0")


def test_a_refresh_changes_nothing_that_the_disk_has_taken(opener: Opener) -> None:
    storage = opener(b"01234567")
    storage.write(2, [b"ab"])
    storage.refresh()
    assert (storage.size(), read(storage, 0, 8)) == (8, b"01ab4567")


def test_a_write_of_nothing_does_not_grow_the_file(opener: Opener) -> None:
    storage = opener(b"0123")
    storage.write(100, [b""])
    assert storage.size() == 4


def test_many_buffers_are_one_write(opener: Opener) -> None:
    storage = opener(b"")
    storage.write(1, [bytes([n % 251]) for n in range(3000)])
    assert read(storage, 1, 3000) == bytes(n % 251 for n in range(3000))


def test_a_read_on_the_spot_fills_or_declines(opener: Opener) -> None:
    storage = opener(b"a" * 4096)
    filled = 0
    for _ in range(50):
        data = bytearray(b"?" * 512)
        if storage.read_now(1024, memoryview(data)):
            filled += 1
            assert data == b"a" * 512
    assert filled
    assert not storage.read_now(4000, memoryview(bytearray(512)))


def test_what_is_said_to_be_a_hole_reads_as_zeros(opener: Opener) -> None:
    """Data is never a hole; a hole may be data, where the file system keeps it as such."""
    storage = opener(b"a" * 5000)
    storage.resize(1 << 20)
    storage.write(300_000, [b"b"])
    offset, holes = 0, 0
    while offset < 1 << 20:
        extent = storage.extent(offset)
        assert extent.end > offset
        if extent.hole:
            size = min(extent.end, 1 << 20) - offset
            assert read(storage, offset, size) == bytes(size)
            holes += size
        offset = extent.end
    assert holes > 900_000
    assert storage.extent(300_000) == storage.extent(300_000)
    assert not storage.extent(300_000).hole
    assert storage.extent(1 << 20) == storage.extent(1 << 30) == FileExtent(MAX_FILE_SIZE, hole=True)


def test_a_barrier_and_a_dropped_cache_change_nothing(opener: Opener) -> None:
    storage = opener(b"a" * 8192)
    storage.write(0, [b"b" * 4096])
    storage.barrier()
    storage.drop_cache(0, 8192)
    assert read(storage, 0, 8192) == b"b" * 4096 + b"a" * 4096
    assert storage.disk_usage() >= 0


def test_what_is_punched_reads_as_zeros_and_the_length_stays(opener: Opener) -> None:
    storage = opener(b"x" * 20000)
    assert storage.punch(4096, 8192)
    assert read(storage, 0, 20000) == b"x" * 4096 + bytes(8192) + b"x" * 7712
    assert storage.size() == 20000


def test_what_changes_the_file_changes_its_mark(opener: Opener) -> None:
    storage = opener(b"x" * 8192)
    marks = [storage.change_mark(), storage.change_mark()]
    time.sleep(0.02)  # two ticks of the clock of file times
    storage.write(0, [b"y"])
    marks.append(storage.change_mark())
    storage.resize(4096)
    marks.append(storage.change_mark())
    assert set(marks) == {None} or (marks[0] == marks[1] and len(set(marks)) == 3)


def test_a_name_stays_the_same(opener: Opener) -> None:
    storage = opener(b"")
    assert storage.name() == storage.name() != ""


async def test_a_call_in_a_thread_returns_or_raises(opener: Opener) -> None:
    storage = opener(b"0123")
    assert await storage.in_thread(lambda: read(storage, 1, 2)) == b"12"
    with pytest.raises(ZeroDivisionError):
        await storage.in_thread(lambda: storage.size() // 0)


async def test_a_call_in_a_thread_is_not_abandoned(opener: Opener) -> None:
    """Cancelled before it begins it does nothing; cancelled later it runs to its end."""
    storage = opener(b"0123")
    with trio.CancelScope() as scope:
        scope.cancel()
        await storage.in_thread(lambda: storage.write(0, [b"no"]))
    assert scope.cancelled_caught
    assert read(storage, 0, 4) == b"0123"

    ended = False

    def two_writes() -> None:
        storage.write(0, [b"a"])
        storage.write(1, [b"b"])

    async def write() -> None:
        nonlocal ended
        await storage.in_thread(two_writes)
        ended = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert read(storage, 0, 2) == (b"ab" if ended else read(storage, 0, 2))
    assert read(storage, 0, 2) in (b"ab", b"01")


def cut(storage: Storage, size: int) -> None:
    """Somebody else makes the file shorter."""
    if isinstance(storage, FileStorage):
        os.truncate(storage.path, size)
    else:
        assert isinstance(storage, MemoryStorage)
        del storage.bytes[size:]


CALLS: dict[str, Callable[[Storage], object]] = {
    "read": lambda storage: read(storage, 8000, 8),
    "read beyond": lambda storage: read(storage, 50_000, 8),
    "extent": lambda storage: storage.extent(20_000),
    "write in place": lambda storage: storage.write(12_000, [b"x"]),
    "write at the end": lambda storage: storage.write(16_383, [b"x"]),
    "write beyond": lambda storage: storage.write(16_384, [b"x"]),
    "grow": lambda storage: storage.resize(20_480),
    "barrier": lambda storage: storage.barrier(),
    "look": lambda storage: storage.check_length(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grown", ["write", "resize"])
def test_a_cut_is_noticed_and_never_hidden(opener: Opener, call: str, grown: str) -> None:
    """Whichever call meets it first: nothing is read from where the file ended, and nothing makes it longer again."""
    storage = opener(b"a" * 8192)
    if grown == "write":
        storage.write(8192, [b"a" * 4096, b"a" * 4096])
    else:
        storage.resize(16_384)
    storage.check_length()
    cut(storage, 8004)
    with pytest.raises(BadOverlay, match="was truncated to 8004 bytes"):
        CALLS[call](storage)
    assert storage.damage is not None
    for other in CALLS.values():
        with pytest.raises(BadOverlay, match="was truncated to 8004 bytes"):
            other(storage)
    assert (storage.size(), read(storage, 0, 8000)) == (8004, b"a" * 8000)


def test_a_file_that_we_cut_ourselves_is_whole(opener: Opener) -> None:
    storage = opener(b"a" * 8192)
    storage.resize(4096)
    storage.write(0, [b"b" * 4096])
    storage.check_length()
    storage.resize(6000)
    storage.barrier()
    assert read(storage, 4000, 5000) == b"b" * 96 + bytes(4904)


def test_nothing_of_a_foreign_file_is_believed(opener: Opener) -> None:
    storage = opener(b"a" * 8192)
    storage.condemn(BadOverlay("another one's"))
    calls = (lambda: read(storage, 0, 8), lambda: storage.write(0, [b"x"]), storage.barrier, lambda: storage.resize(99))
    for call in calls:
        with pytest.raises(BadOverlay, match="another one's"):
            call()
    assert not storage.read_now(0, memoryview(bytearray(8)))
    assert storage.damage is not None
    assert storage.size() == 8192


# The real file alone.


def test_looks_at_the_length_cost_no_read_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor, where a look is a question to a server, a write inside the file."""
    monkeypatch.setattr("qedfs.overlay.length.LOCAL_TYPES", frozenset())
    path = tmp_path / "file"
    path.write_bytes(b"a" * 16_384)
    with contextlib.closing(FileStorage.open(str(path), writable=True)) as storage:
        looks: list[int] = []

        def look(_: Length) -> int:
            looks.append(0)
            return 16_384

        monkeypatch.setattr(Length, "_look", look)
        read(storage, 0, 4096)
        read(storage, 12_288, 4096)
        storage.read_now(0, memoryview(bytearray(4096)))
        storage.write(4096, [b"b" * 4096])
        assert looks == []
        storage.write(12_288, [b"b" * 4096])
        storage.write(16_384, [b"b" * 4096])
        assert len(looks) == 2
    with contextlib.closing(FileStorage.open(str(path), writable=False, locked=False)) as onlooker:
        looks.clear()
        assert read(onlooker, 20_480, 4) == bytes(4)
        assert looks == []


def test_a_file_opened_for_reading_takes_no_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123")
    storage = FileStorage.open(str(path), writable=False)
    with pytest.raises(ReadOnlyOverlay, match="cannot write"):
        storage.write(0, [b"x"])
    storage.close()
    assert path.read_bytes() == b"0123"


@pytest.fixture(params=["disk", "tmpfs"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file on one kind of file system or the other."""
    path = tmp_path / "file" if request.param == "disk" else Path("/dev/shm", f"qedfs-{random.randrange(1 << 60):x}")
    path.write_bytes(b"x")
    yield path
    path.unlink()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_knows_no_holes_has_data_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    storage = FileStorage.open(str(path), writable=False)
    monkeypatch.setattr(os, "lseek", lambda *_: _raise(OSError(number, os.strerror(number))))
    assert storage.extent(0) == FileExtent(MAX_FILE_SIZE, hole=False)
    monkeypatch.setattr(os, "lseek", lambda *_: _raise(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(QedfsError, match="cannot look for holes: Input/output error"):
        storage.extent(0)
    storage.close()


def _raise(error: OSError) -> int:
    raise error


# The twins alone.


def test_faults_come_when_they_were_ordered() -> None:
    storage = MemoryStorage(bytes(2048))
    storage.fail("write", NoSpace("full"), nth=2)
    storage.write(0, [b"a" * 1024])
    with pytest.raises(NoSpace):
        storage.write(1024, [b"b" * 1024])
    assert storage.bytes == b"a" * 1024 + b"b" * 512 + bytes(512)
    storage.fail("write", NoSpace("full"), wrote=0)
    with pytest.raises(NoSpace):
        storage.write(1 << 20, [b"b" * 1024])
    assert storage.size() == 2048
    storage.write(0, [b"c"])
    storage.fail("barrier", QedfsError("gone"), forever=True)
    for _ in range(3):
        with pytest.raises(QedfsError, match="gone"):
            storage.barrier()
    storage.mend()
    storage.barrier()


def test_the_log_tells_what_happened_in_order() -> None:
    storage = RecordingStorage(b"")
    storage.write(4, [b"ab", b"c"])
    storage.mark("here")
    storage.barrier()
    storage.resize(100)
    assert storage.log == [Written(4, b"abc"), Marked("here"), BarrierBegun(1), BarrierEnded(1), Resized(100)]
    again = storage.reopened()
    again.barrier()
    assert storage.log[-2:] == [BarrierBegun(2), BarrierEnded(2)]


async def test_a_seed_interleaves_threads_the_same_way_each_time(autojump_clock: trio.testing.MockClock) -> None:
    async def history(seed: int) -> list[object]:
        storage = RecordingStorage(b"", seed=seed)

        def three(byte: bytes) -> None:
            for place in range(3):
                storage.write(place, [byte])

        async with trio.open_nursery() as nursery:
            for byte in (b"a", b"b"):
                nursery.start_soon(storage.in_thread, lambda byte=byte: three(byte))
                await trio.lowlevel.checkpoint()
        return list(storage.log)

    histories = {seed: await history(seed) for seed in range(12)}
    mixed = [log for log in histories.values() if log[0] != log[2]]  # not simply one thread after the other
    assert len({str(log) for log in histories.values()}) > 3
    assert mixed
    assert not [thread for thread in threading.enumerate() if thread.name == "storage steps"]
    assert trio.current_time() < 1


def test_what_a_file_server_says_at_the_close_is_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage.open(str(path), writable=True)
    closed: list[int] = []

    def close(fd: int) -> None:
        closed.append(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr("qedfs.overlay.storage.os.close", close)
        storage.close()
        storage.close()
    assert len(closed) == 1
    os.close(closed[0])


def is_unsynced(storage: Storage) -> bool:
    return storage.unsynced


def test_what_a_barrier_has_not_covered_is_known(opener: Opener) -> None:
    storage = opener(bytes(8192))
    assert is_unsynced(storage)
    changes: list[Callable[[], object]] = [
        lambda: storage.write(0, [b"x"]),
        lambda: storage.resize(16384),
        lambda: storage.punch(0, 4096),
    ]
    for change in changes:
        storage.barrier()
        assert not is_unsynced(storage)
        change()
        assert is_unsynced(storage)


async def test_a_call_that_is_begun_in_a_thread_tells_how_it_has_ended(opener: Opener) -> None:
    storage = opener(b"x" * 512)
    ended: list[Exception | None] = []
    problem = QedfsError("no")

    def fail() -> None:
        raise problem

    storage.begin_in_thread(storage.barrier, ended.append)
    storage.begin_in_thread(fail, ended.append)
    while len(ended) < 2:
        await trio.lowlevel.checkpoint()
    assert sorted(ended, key=repr) == [None, problem]


def test_a_write_that_need_not_wait_is_told_and_changes_nothing(opener: Opener) -> None:
    storage = opener(b"0123456789")
    assert not storage.would_wait()
    storage.wait_to_write()
    assert not storage.would_wait()
    assert (storage.size(), read(storage, 0, 10)) == (10, b"0123456789")
