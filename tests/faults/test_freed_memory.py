"""What was freed goes back to the kernel, though small things that stay lie between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trio
import trio.testing

from qedfs.fetch.buffer_pool import BufferPool
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
        await give_back_memory(BufferPool())
    assert before - _resident() > SIZE * COUNT // 2
    assert len(stay) == COUNT


def test_large_buffers_go_back_to_the_kernel_though_small_ones_after_them_stay() -> None:
    """In a process of its own: the setting lasts as long as the process."""
    script = """
import sys
from qedfs.fetch.buffer_pool import BufferPool
from qedfs.mount.memory import set_up
if sys.argv[1] == "with":
    set_up()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
bytearray(16 << 20)  # freed at once: what is smaller is not mapped any more, if nobody has said so
small = []
large = []
for _ in range(32):
    large.append(bytearray(2 << 20))
    large[-1][::4096] = b"x" * 512
    small.append([bytes(2000) for _ in range(20)])
most = resident()
large.clear()
print(most - resident())
"""
    given_back = {
        word: int(
            subprocess.run([sys.executable, "-c", script, word], capture_output=True, text=True, check=True).stdout
        )
        for word in ("with", "without")
    }
    assert given_back["with"] > 60 << 20
    assert given_back["without"] < given_back["with"] // 2


def test_buffers_of_a_request_in_the_heap_go_back_with_the_next_trim() -> None:
    """Those of FUSE's largest request are not mapped, and lie between small ones."""
    script = """
import trio, trio.testing
from qedfs.fetch.buffer_pool import BufferPool
from qedfs.mount.memory import INTERVAL_SECONDS, LARGE_BYTES, give_back_memory, set_up
set_up()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
async def main():
    small, large = [], []
    for _ in range(64):
        large.append(bytearray(1 << 20))
        large[-1][::4096] = b"x" * 256
        small.append([bytes(2000) for _ in range(20)])
    assert len(large[0]) < LARGE_BYTES
    most = resident()
    large.clear()
    with trio.move_on_after(1.5 * INTERVAL_SECONDS):
        await give_back_memory(BufferPool())
    print(most - resident())
trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 60 << 20
