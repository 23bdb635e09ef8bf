"""A pool of free buffers for reuse, because a fresh buffer of 1 MiB costs 200 us of page faults.

Owns only the free buffers. The pool is bounded in bytes, however many sources share it and however many sizes there
are. Buffers that are not used for a while are freed. Imports nothing of the project.
"""

from __future__ import annotations

MOST_BYTES = 32 << 20  # 32 requests of 1 MiB


class BufferPool:
    """Free buffers by size. A buffer from the pool has arbitrary contents."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """`most_bytes`: the bound for the free buffers of all sizes."""
        self.kept_bytes = 0
        self._most_bytes = most_bytes
        self._free: dict[int, list[bytearray]] = {}  # by size, the least recently used size first
        self._unused: dict[int, int] = {}  # by size, how many have been free since the last `forget_unused`

    def take(self, size: int) -> bytearray:
        """Take a buffer of this size."""
        free = self._free.pop(size, None)
        if not free:
            return bytearray(size)
        buffer = free.pop()
        if free:
            self._free[size] = free
        if len(free) < self._unused.get(size, 0):
            self._unused[size] = len(free)
        self.kept_bytes -= size
        return buffer

    def give(self, buffer: bytearray) -> None:
        """Return a buffer, which must not be used any more. The least recently used sizes make room for it."""
        size = len(buffer)
        if size > self._most_bytes:
            return
        free = self._free.pop(size, [])
        free.append(buffer)
        self._free[size] = free
        self.kept_bytes += size
        while self.kept_bytes > self._most_bytes:
            self._drop(next(iter(self._free)))

    def forget_unused(self) -> None:
        """Free the buffers that have not been used since the last call."""
        for size, count in self._unused.items():
            for _ in range(min(count, len(self._free.get(size, ())))):
                self._drop(size)
        self._unused = {size: len(free) for size, free in self._free.items()}

    def _drop(self, size: int) -> None:
        self._free[size].pop()
        self.kept_bytes -= size
        if not self._free[size]:
            del self._free[size]
