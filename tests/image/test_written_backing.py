"""A backing that is read while this process writes to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.image.commit_target import RawTarget
from qedfs.image.written_backing import WrittenBacking
from qedfs.source.url import parse_location
from tests.fakes.storage import RecordingStorage

SIZE = 64 << 10


async def opened() -> tuple[WrittenBacking, RecordingStorage, RawTarget]:
    storage = RecordingStorage(b"a" * SIZE)
    target = await RawTarget.of(storage, lambda: None)
    return WrittenBacking(target, parse_location("/base.raw")), storage, target


async def test_it_reads_what_was_written_a_moment_ago_and_tells_no_time() -> None:
    source, _, target = await opened()
    await target.store(4096, memoryview(b"n" * 4096))
    view = memoryview(bytearray(8192))
    await source.read(0, view)
    assert bytes(view) == b"a" * 4096 + b"n" * 4096
    assert (source.identity.size, source.identity.validators, source.received) == (SIZE, (None, None), 8192)
    assert await source.extents(0, SIZE) is None
    with pytest.raises(ValueError, match="not inside"):
        await source.read(SIZE, view)


async def test_a_disk_that_fails_is_a_source_that_is_away() -> None:
    source, storage, _ = await opened()
    storage.fail("read", QedfsError("the disk is broken"), nth=1)
    with pytest.raises(SourceUnreachable, match=r"/base\.raw: the disk is broken"):
        await source.read(0, memoryview(bytearray(512)))


async def test_its_end_waits_for_the_reads_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _ = await opened()
    go_on = trio.Event()

    async def slow(*_: object) -> None:
        await go_on.wait()

    monkeypatch.setattr(source, "_read_from", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.read, 0, memoryview(bytearray(512)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(source.aclose)
        await trio.testing.wait_all_tasks_blocked()
        for ask in (source.read(0, memoryview(bytearray(512))), source.extents(0, 512)):
            with pytest.raises(SourceUnreachable, match="closed"):
                await ask
        assert nursery.child_tasks
        go_on.set()


async def test_a_reader_may_give_up_while_the_disk_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    source, storage, _ = await opened()
    answers, view = trio.Event(), memoryview(bytearray(512))

    async def hangs(function: Callable[[], object]) -> object:
        with trio.CancelScope(shield=True):  # as a thread, which nobody can cancel
            await answers.wait()
        return function()

    monkeypatch.setattr(storage, "in_thread", hangs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.read, 0, view)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await source.aclose()
    answers.set()
    await trio.testing.wait_all_tasks_blocked()
    assert bytes(view) == bytes(512)
