"""Buffers that are used again: a fresh one of 1 MiB costs 200 us of page faults.

Owns nothing but free buffers, and at most so many bytes of them, however many sources share them and however many
sizes there are; those that nobody takes for a while go. A leaf.
"""

from __future__ import annotations

MOST_BYTES = 32 << 20  # a window of 1 MiB requests


class BufferPool:
    """Free buffers by size. What is handed out holds any bytes."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """`most_bytes`: kept at the most, all sizes together."""
        self.kept_bytes = 0
        self._most_bytes = most_bytes
        self._free: dict[int, list[bytearray]] = {}  # in the order in which the sizes were last used
        self._unused: dict[int, int] = {}  # how many of a size have been free ever since the last `forget_unused`

    def take(self, size: int) -> bytearray:
        """A buffer of this size."""
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
        """Take it back; nobody may use it any more. Sizes that nobody has asked for lately make room."""
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
        """Let the buffers go that were free all the time since the last call."""
        for size, count in self._unused.items():
            for _ in range(min(count, len(self._free.get(size, ())))):
                self._drop(size)
        self._unused = {size: len(free) for size, free in self._free.items()}

    def _drop(self, size: int) -> None:
        self._free[size].pop()
        self.kept_bytes -= size
        if not self._free[size]:
            del self._free[size]
