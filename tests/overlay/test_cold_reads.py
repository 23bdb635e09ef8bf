"""Reads of bytes that the page cache lacks: tries on the event loop while they pay off, a worker thread otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import trio

from qedfs.errors import QedfsError
from qedfs.overlay.cold_reads import CREDIT, MOST_BYTES, PAUSE, TRIES, ColdReads
from tests.fakes.storage import MemoryStorage

T = TypeVar("T")
DATA = bytes(range(256)) * 16


class Slow(MemoryStorage):
    """A disk whose bytes reach the page cache at the `arrives`-th try of a read; and which counts threads."""

    def __init__(self) -> None:
        super().__init__(DATA * (2 * MOST_BYTES // len(DATA)), name="disk")
        self.arrives = 0
        self.tries = 0
        self.threads = 0

    def read_now(self, offset: int, view: memoryview) -> bool:
        self.tries += 1
        return self.tries >= self.arrives and super().read_now(offset, view)

    async def in_thread(self, function: Callable[[], T]) -> T:
        self.threads += 1
        return await super().in_thread(function)


async def cold(reads: ColdReads, storage: Slow, *, arrives: int, size: int = 4096) -> None:
    storage.arrives, storage.tries = arrives, 0
    view = memoryview(bytearray(size))
    await reads.read(0, view)
    assert bytes(view) == storage.bytes[:size]


async def test_bytes_that_arrive_soon_take_no_thread() -> None:
    storage = Slow()
    reads = ColdReads(storage)
    for arrives in (1, 2, TRIES):
        await cold(reads, storage, arrives=arrives)
        assert (storage.tries, storage.threads) == (arrives, 0)


async def test_bytes_that_do_not_arrive_are_read_in_a_thread() -> None:
    storage = Slow()
    await cold(ColdReads(storage), storage, arrives=TRIES + 1)
    assert (storage.tries, storage.threads) == (TRIES, 1)


async def test_a_slow_disk_is_rarely_tried() -> None:
    storage = Slow()
    reads = ColdReads(storage)
    for _ in range(CREDIT):
        await cold(reads, storage, arrives=TRIES + 1)
    tries = 0
    for _ in range(PAUSE):
        await cold(reads, storage, arrives=TRIES + 1)
        tries += storage.tries
    assert tries == 0
    await cold(reads, storage, arrives=1)  # the disk is fast again, and this read finds out
    await cold(reads, storage, arrives=1)
    assert storage.threads == CREDIT + PAUSE


async def test_a_large_read_goes_to_a_thread_at_once() -> None:
    storage = Slow()
    await cold(ColdReads(storage), storage, arrives=1, size=MOST_BYTES + 1)
    assert (storage.tries, storage.threads) == (0, 1)


async def test_other_tasks_run_between_the_tries() -> None:
    storage = Slow()
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            ran += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await cold(ColdReads(storage), storage, arrives=TRIES)
        nursery.cancel_scope.cancel()
    assert ran >= TRIES - 1


async def test_an_error_of_the_disk_is_raised() -> None:
    storage = Slow()
    storage.fail("read", QedfsError("EIO"), forever=True)
    with pytest.raises(QedfsError, match="EIO"):
        await cold(ColdReads(storage), storage, arrives=TRIES + 1)
