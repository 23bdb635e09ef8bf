"""What was freed goes back to the kernel, though small things that stay lie between."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from qedfs.mount.memory import INTERVAL_SECONDS, give_back_memory

SIZE = 100_000  # below the size from which the C library maps each buffer by itself
COUNT = 1000


def _resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def test_memory_is_given_back(autojump_clock: trio.testing.MockClock) -> None:
    buffers, stay = [], []
    for _ in range(COUNT):
        buffers.append(bytearray(b"x") * SIZE)
        stay.append(bytearray(2000))
    del buffers
    before = _resident()
    with trio.move_on_after(1.5 * INTERVAL_SECONDS):
        await give_back_memory()
    assert before - _resident() > SIZE * COUNT // 2
    assert len(stay) == COUNT
