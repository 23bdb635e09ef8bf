"""Writes on the event loop: how long a slow one keeps the next ones off it, and what is not a slow one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

from qedfs.overlay import loop_writes
from qedfs.overlay.loop_writes import MOST_BYTES, REST, SLOW_SECONDS, WATCHED, LoopWrites
from qedfs.overlay.open import open_storage
from qedfs.overlay.storage import Buffer
from tests.fakes.storage import MemoryStorage
from tests.overlay.guest import no_fill
from tests.overlay.images import filled

T = TypeVar("T")
CLUSTER = 4096


def never() -> bool:
    return False


class Thread:
    """The thread of the event loop: the time, and how often it has slept for something else than a processor."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 7

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Thread:
    thread = Thread()
    monkeypatch.setattr("qedfs.overlay.loop_writes.monotonic", lambda: thread.now)
    monkeypatch.setattr(loop_writes, "_sleeps", lambda: thread.slept)
    monkeypatch.setattr("qedfs.overlay.loop_writes.dirty_pages.crowded", lambda _: False)
    return thread


def is_on_loop(writes: LoopWrites, during: Callable[[], None] = lambda: None) -> bool:
    """Write, and do something during the write. Returns whether it ran on the event loop."""
    if not writes.may_begin(1):
        return False
    during()
    writes.ended()
    return True


def test_only_writes_of_fuse_run_there(thread: Thread, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = LoopWrites(never)
    assert writes.may_begin(MOST_BYTES)
    assert not writes.may_begin(MOST_BYTES + 1)
    monkeypatch.setattr("qedfs.overlay.loop_writes.dirty_pages.crowded", lambda _: True)
    assert not writes.may_begin(1)


def test_slow_writes_leave_the_loop_for_a_hundred_times_as_long(thread: Thread) -> None:
    writes = LoopWrites(never)
    assert is_on_loop(writes, lambda: thread.sleep(0.3))  # from now on writes are watched
    assert is_on_loop(writes, lambda: thread.sleep(0.3))
    for _ in range(5):
        thread.now += REST * 0.3 - 1
        assert not is_on_loop(writes)
        thread.now += 2
        assert is_on_loop(writes, lambda: thread.sleep(0.3))  # one is enough if it is slow again
    thread.now += REST * 0.3 + 1
    for _ in range(1000):
        assert is_on_loop(writes, lambda: thread.sleep(SLOW_SECONDS / 2))


def test_a_busy_processor_does_not_drive_writes_from_the_loop(thread: Thread) -> None:
    writes = LoopWrites(never)

    def wait_for_processor() -> None:
        thread.now += 1.0

    assert all(is_on_loop(writes, wait_for_processor) for _ in range(5 * WATCHED))


def test_a_single_slow_write_is_forgotten(thread: Thread) -> None:
    writes = LoopWrites(never)
    for _ in range(3):
        assert is_on_loop(writes, lambda: thread.sleep(0.3))
        assert all(is_on_loop(writes) for _ in range(WATCHED))


async def test_no_write_to_a_frozen_file_system_is_on_the_loop() -> None:
    class Disk(MemoryStorage):
        """Notes what is done to it on the event loop while it is frozen."""

        in_thread_now = False

        async def in_thread(self, function: Callable[[], T]) -> T:
            self.in_thread_now = True
            try:
                return await super().in_thread(function)
            finally:
                self.in_thread_now = False

        def write(self, offset: int, data: Sequence[Buffer]) -> None:
            assert self.in_thread_now or not self.frozen
            super().write(offset, data)

        def resize(self, size: int) -> None:
            assert not self.frozen  # this is always on the loop
            super().resize(size)

    disk = Disk(filled({0: b"0"}).data)
    overlay = await open_storage(disk)
    disk.frozen = True
    assert not overlay.write_now(0, b"x")
    await overlay.write(0, b"x", no_fill)
    assert overlay.times.may_move
    assert not overlay.write_now(0, b"x")
    assert disk.frozen
    await overlay.write(CLUSTER, b"y" * CLUSTER, no_fill)  # and commit it, which makes the file grow
    assert disk.operations["wait"] == 1
    assert overlay.write_now(0, b"z")
    disk.frozen = True
    await overlay.discard(0, 1)
    await overlay.close()
    assert disk.operations["wait"] == 2


async def test_commits_and_discards_do_not_starve_while_threads_write_to_the_file_all_the_time() -> None:
    class Disk(MemoryStorage):
        """Locked by another write whenever somebody looks."""

        waits = 0

        def would_wait(self) -> bool:
            return True

        def wait_to_write(self) -> None:
            self.waits += 1
            assert self.waits <= 4  # once for each commit, and for the discard

    disk = Disk(filled({0: b"0"}).data)
    overlay = await open_storage(disk)
    await overlay.write(CLUSTER, b"y" * CLUSTER, no_fill)
    await overlay.flush()
    await overlay.discard(0, 1)
    await overlay.close()
    assert disk.waits


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_slow_disk_of_one_overlay_stalls_the_event_loop_twice_and_not_at_each_write(
    thread: Thread, *, in_place: bool
) -> None:
    class Disk(MemoryStorage):
        """A disk whose writes sleep, and which counts those on the event loop."""

        slow = in_thread_now = False
        stalls = 0

        def write(self, offset: int, data: Sequence[Buffer]) -> None:
            if self.slow and not self.in_thread_now:
                self.stalls += 1
                thread.sleep(0.3)
            super().write(offset, data)

        async def in_thread(self, function: Callable[[], T]) -> T:
            self.in_thread_now = True
            try:
                return await super().in_thread(function)
            finally:
                self.in_thread_now = False

    disk = Disk(filled({0: b"0"}).data)
    overlay = await open_storage(disk)
    await overlay.write(0, b"x", no_fill)  # the first one also stores in the record that the times move
    disk.slow = True
    for number in range(1, 20):
        pos, data = (number, bytes([number])) if in_place else (number * CLUSTER, bytes([number]) * CLUSTER)
        if not overlay.write_now(pos, data):
            await overlay.write(pos, data, no_fill)
    assert disk.stalls == 2
    disk.slow = False
    for number in range(1, 20):
        (run,) = await overlay.map(number if in_place else number * CLUSTER, 1)
        found = bytearray(1)
        await overlay.read_data(run.offset, memoryview(found))
        assert found == bytes([number])
    await overlay.close()
