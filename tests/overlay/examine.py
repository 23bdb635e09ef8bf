"""Judge one state of an overlay file after a crash: open it, read all of it, check it, and work on with it.

Owns the list of what must hold. Must not know how the state came about.
"""

from __future__ import annotations

import random

from qedfs.errors import QedfsError
from qedfs.overlay.check import check
from qedfs.overlay.open import open_storage
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.session import read_header
from tests.fakes.storage import MemoryStorage
from tests.overlay.scenario import PIN, History, Scenario, read_all

GUEST = b"after the crash." * 32


class Broken(Exception):
    """A promise was broken; the text says which."""


async def examine(image: bytes | bytearray, history: History, at: float, rng: random.Random) -> None:
    """Raise Broken unless `image` is a legal state of `history` after a crash at position `at`."""
    scenario = history.scenario
    try:
        _judge_before_opening(image, history, at)
        storage = MemoryStorage(image)
        overlay = await open_storage(storage)
        _judge_header(overlay, history, at)
        judge_times(overlay, history, at)
        content = await read_all(overlay, scenario.base)
        fault = history.model.fault(content, at)
        if fault:
            raise Broken(fault)
        _judge_tables(storage, "after opening")
        await _work_on(overlay, content, scenario, rng)
    except QedfsError as exc:
        raise Broken(f"{type(exc).__name__}: {exc}") from exc


def _judge_before_opening(image: bytes | bytearray, history: History, at: float) -> None:
    """Without NEED_CHECK the file has to be sound as it is: a program that does not repair may open it."""
    storage = MemoryStorage(image, writable=False)
    header, _ = read_header(storage)
    if not header.dirty:
        _judge_tables(storage, "before opening")
    elif not history.scenario.dirty:
        raise Broken("NEED_CHECK is set")


def _judge_tables(storage: MemoryStorage, when: str) -> None:
    header, _ = read_header(storage)
    report = check(storage, header)
    if report.corruptions:
        raise Broken(f"check {when}: {report.corruptions} corruptions, first: {report.first_problem}")


def _judge_header(overlay: Overlay, history: History, at: float) -> None:
    if history.detached_at <= at and overlay.backing is not None:
        raise Broken("the detach was reported and the backing is still there")
    if history.pinned_at <= at and overlay.backing is not None and overlay.record.pin != PIN:
        raise Broken("the pin was stored and is gone, while the overlay still has its backing")


def judge_times(overlay: Overlay, history: History, at: float) -> None:
    """The image's mtime is another one if a write has survived, and the old one if nobody had begun to write."""
    storage = overlay.storage
    assert isinstance(storage, MemoryStorage)
    moved = overlay.times.modified_ns != storage.written_ns
    # The note may find no room where the write finds some, and the disk may take the write and not the note.
    scenario = history.scenario
    sound = not (scenario.full_disk or scenario.bad_barrier or scenario.killed)
    if sound and history.model.has_committed(at) and not moved:
        raise Broken("a write has survived, and the image has the mtime from before")
    if moved and history.fresh and not history.model.has_begun(at):
        raise Broken("nobody has written, and the image has another mtime")


async def _work_on(overlay: Overlay, content: bytearray, scenario: Scenario, rng: random.Random) -> None:
    """Write, adopt, flush, close and open again: what was found is settled now and must not change."""
    geometry = scenario.geometry
    size = geometry.cluster_size
    base = scenario.base

    async def fill(cluster: int) -> bytes:
        return base[cluster * size : (cluster + 1) * size].ljust(size, b"J")

    for _ in range(2):
        pos = rng.randrange(0, geometry.image_size, 512)
        data = GUEST[: geometry.image_size - pos]
        await overlay.write(pos, data, fill)
        content[pos : pos + len(data)] = data
    if overlay.backing is not None:
        first = rng.randrange(geometry.clusters)
        fetched = bytearray(base[first * size : (first + 2) * size])
        await overlay.adopt(first * size, fetched, len(fetched))
    await overlay.flush()
    storage = overlay.storage
    assert isinstance(storage, MemoryStorage)
    await overlay.close()
    again = MemoryStorage(storage.bytes, writable=False)
    if await read_all(await open_storage(again), base) != content:
        raise Broken("after the crash, more work and a clean close, the image differs")
    _judge_tables(again, "after more work")


async def read_content(image: bytes | bytearray, base: bytes) -> bytes:
    """What the image in an overlay file reads as, after the repair that opening it may need."""
    return bytes(await read_all(await open_storage(MemoryStorage(image)), base))
