"""The threads of an overlay: whatever the stream adopts, there is one for a reader and one for a guest's write."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.storage import Buffer, FileStorage
from tests.harness.hang import HANG_SECONDS
from tests.overlay.guest import no_fill

MIB = 1 << 20
READERS = 8


async def write(overlay: Overlay, pos: int, data: bytes) -> None:
    await overlay.write(pos, data, no_fill)


async def read(overlay: Overlay, pos: int, size: int) -> bytes:
    (run,) = await overlay.map(pos, size)
    buffer = bytearray(size)
    await overlay.read_data(run.offset, memoryview(buffer))
    return bytes(buffer)


async def test_no_reader_waits_for_a_thread_behind_adoptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    real_write = FileStorage.write

    def slow_write(self: FileStorage, offset: int, data: Sequence[Buffer]) -> None:
        if sum(map(len, data)) == MIB:
            released.wait(HANG_SECONDS)
        real_write(self, offset, data)

    monkeypatch.setattr(FileStorage, "write", slow_write)
    monkeypatch.setattr(FileStorage, "read_now", lambda *_: False)  # nothing is in the page cache
    create_overlay(str(tmp_path / "disk.qed"), image_size=1 << 30, backing="http://127.0.0.1/")
    overlay = await open_overlay(str(tmp_path / "disk.qed"), writable=True)
    await write(overlay, 0, b"local" * (MIB // 8))
    try:
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(overlay.adopt, (16 + number) * MIB, bytearray(b"s" * MIB), MIB)
            await trio.testing.wait_all_tasks_blocked()
            try:
                with trio.fail_after(HANG_SECONDS):
                    async with trio.open_nursery() as guests:
                        for number in range(READERS):
                            guests.start_soon(read, overlay, number * 5, 4096)
                        guests.start_soon(write, overlay, 8 * MIB, b"guest" * (MIB // 8))
            finally:
                released.set()
        assert await read(overlay, 8 * MIB, 5) == b"guest"
        assert [await read(overlay, (16 + number) * MIB, 5) for number in range(64)] == [b"sssss"] * 64
    finally:
        await overlay.close()
