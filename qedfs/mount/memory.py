"""Keeps to the memory that this process may use: bounds for what images hold, and nothing kept that nobody uses.

Owns the calls to the C library, which are left out without glibc. Must not know what is held, nor who sets the limit.
"""

from __future__ import annotations

import ctypes
import gc

import trio

from qedfs.fetch.buffer_pool import BufferPool
from qedfs.host import memory_pool
from qedfs.host.cgroup import memory_limit

INTERVAL_SECONDS = 10.0
# mallopt(3), <malloc.h>
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
# Buffers of fetched bytes are larger, and everything that lives long is smaller.
LARGE_BYTES = 512 << 10


def set_up() -> None:
    """Set the bounds, and the C library to give back what is freed."""
    memory_pool.fit_into(memory_limit())
    _map_large_buffers()
    gc.freeze()  # what is there by now lives as long as the mount: no collection needs to go through it


def _map_large_buffers() -> None:
    """Give large buffers mappings of their own, which go back when they are freed, and all threads one heap.

    By itself glibc raises the size from which it maps to that of the largest buffer that was freed, up to 32 MiB; from
    then on buffers and small objects that stay lie in one heap, and it has eight heaps for each processor. While images
    came, streamed in and went for 90 s, a mount grew from 87 to 132 MiB, and with this to 89; the number of its objects
    stayed the same. Each heap is held by the interpreter's lock anyway.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_ARENA_MAX, 1)


async def give_back_memory(buffers: BufferPool) -> None:
    """Forget unused buffers and trim the heap now and then, until cancelled: 0.4 ms for 100 MiB.

    glibc by itself gives back its top only. The limit is looked at again, too: a service manager can change it.
    """
    trim = _function("malloc_trim")
    while True:
        await trio.sleep(INTERVAL_SECONDS)
        memory_pool.fit_into(memory_limit())
        buffers.forget_unused()
        if trim is not None:
            trim(0)


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    try:
        found: ctypes._NamedFuncPointer = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
    return found
