"""In a still moment the file holds what has returned, and nothing gets into it, whatever is asked for meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from qedfs.errors import QedfsError, ReadOnlyOverlay
from qedfs.format.header import decode_header
from qedfs.format.tables import ZERO
from qedfs.overlay.dirty_pages import dirty_pages
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_record
from qedfs.overlay.session_copy import end_session
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty

CLUSTER = 4096
OWN = 4  # clusters of each worker
WORKERS = 4
SIZE = OWN * WORKERS * CLUSTER
BACKING = b"s"


async def shown(overlay: Overlay) -> bytes:
    """What an overlay over a backing of this one byte reads as."""
    found = bytearray(BACKING * SIZE)
    for run in await overlay.map(0, SIZE):
        if run.offset == ZERO:
            found[run.pos : run.pos + run.size] = bytes(run.size)
        elif run.offset > ZERO:
            await overlay.read_data(run.offset, memoryview(found)[run.pos : run.pos + run.size])
    return bytes(found)


class Worker:
    """Writes and discards in clusters of its own, one after the other. `states`: after none, one, two ... of them."""

    def __init__(self, overlay: Overlay, number: int, seed: int) -> None:
        self.overlay = overlay
        self.start = number * OWN * CLUSTER
        self.random = random.Random(seed)
        self.states = [BACKING * OWN * CLUSTER]
        self.returned = 0

    async def run(self) -> None:
        while True:
            content = bytearray(self.states[-1])
            if self.random.random() < 0.3:
                first = self.random.randrange(OWN)
                content[first * CLUSTER : (first + 1) * CLUSTER] = bytes(CLUSTER)
                self.states.append(bytes(content))
                await self.overlay.discard(self.start // CLUSTER + first, 1)
            else:
                size = self.random.choice((100, CLUSTER, 2 * CLUSTER + 77))
                pos = self.random.randrange(OWN * CLUSTER - size)
                data = self.random.randbytes(size)
                content[pos : pos + size] = data
                self.states.append(bytes(content))
                if not self.overlay.write_now(self.start + pos, data):
                    await self.overlay.write(self.start + pos, data, self.fill)
            self.returned += 1
            await trio.lowlevel.checkpoint()

    async def fill(self, _: int) -> bytes:
        for _ in range(self.random.randrange(20)):
            await trio.lowlevel.checkpoint()
        return BACKING * CLUSTER

    def may_show(self, content: bytes) -> bool:
        """Whether all that has returned is there, and of what is under way all or nothing."""
        return content[self.start : self.start + OWN * CLUSTER] in self.states[self.returned :]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("journal", [True, False])
async def test_a_copy_is_the_image_at_one_moment(
    tmp_path: Path, seed: int, journal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dirty_pages, "crowded", lambda _: seed % 2 == 1)  # then writes run in threads
    storage = MemoryStorage(empty(image_size=SIZE).data, seed=seed, name="disk")
    overlay = await open_storage(storage, journal_folder=tmp_path if journal else None)
    workers = [Worker(overlay, number, seed * WORKERS + number) for number in range(WORKERS)]

    async def adopt() -> None:
        while True:
            pos = random.Random(seed).randrange(OWN * WORKERS - 3) * CLUSTER
            await overlay.adopt(pos, bytearray(BACKING * 3 * CLUSTER), 3 * CLUSTER)
            await trio.lowlevel.checkpoint()

    async def flush() -> None:
        while True:
            await overlay.flush()
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for task in (*(worker.run for worker in workers), adopt, flush):
            nursery.start_soon(task)
        for turn in range(4):
            while sum(worker.returned for worker in workers) < 5 * turn:
                await trio.lowlevel.checkpoint()
            async with overlay.still():
                before = bytes(storage.bytes)
                for _ in range(30):
                    await trio.lowlevel.checkpoint()
                assert storage.bytes == before
                assert len(before) % CLUSTER == 0
                content = await copied(before)
                assert all(worker.may_show(content) for worker in workers)
        nursery.cancel_scope.cancel()
    assert overlay.times.may_move
    await overlay.close()


async def copied(content: bytes) -> bytes:
    copy = MemoryStorage(content)
    end_session(copy, modified_ns=1, changed_ns=2)
    header = decode_header(bytes(copy.bytes[:64]), len(copy.bytes))
    record = read_record(copy, header)
    assert record is not None
    assert (record.session, record.journal, record.times, record.written) == ("", "", (1, 2), False)
    assert not header.dirty
    overlay = await open_storage(copy)
    found = await shown(overlay)
    await overlay.close()
    return found


async def test_a_write_that_waits_for_its_source_holds_nothing_up_and_goes_on_afterwards() -> None:
    storage = MemoryStorage(empty(image_size=SIZE).data)
    overlay = await open_storage(storage)
    source = trio.Event()

    async def fill(_: int) -> bytes:
        await source.wait()
        return BACKING * CLUSTER

    async with trio.open_nursery() as nursery:
        nursery.start_soon(overlay.write, 10, b"guest", fill)
        async with overlay.still():
            source.set()
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            assert await shown(overlay) == BACKING * SIZE
    assert (await shown(overlay))[8:17] == BACKING * 2 + b"guest" + BACKING * 2
    await overlay.close()


async def test_after_a_failed_barrier_there_is_no_still_moment_and_the_session_is_as_before() -> None:
    storage = MemoryStorage(empty(image_size=SIZE).data)
    overlay = await open_storage(storage)
    await overlay.discard(0, 1)
    storage.fail("barrier", QedfsError("Input/output error"))
    with pytest.raises(ReadOnlyOverlay):
        async with overlay.still():
            pass
    assert overlay.failure is not None


async def test_no_barrier_runs_that_could_fail_unnoticed_by_the_copy() -> None:
    storage = MemoryStorage(empty(image_size=SIZE).data)
    overlay = await open_storage(storage)
    await overlay.write(0, bytes(CLUSTER - 1) + b"x", _none)
    begun: list[object] = []
    async with trio.open_nursery() as nursery, overlay.still():
        storage.write(len(storage.bytes) - 1, [b"y"])
        assert not overlay.flush_now(begun.append)
        nursery.start_soon(overlay.flush)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        waits = storage.unsynced
    assert (waits, storage.unsynced, begun) == (True, False, [])
    await overlay.close()


async def _none(_: int) -> bytes:
    raise AssertionError
