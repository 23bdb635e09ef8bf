"""Reads and writes under way that have looked up where in the file their bytes are. Imports nothing of the project.

Owns their numbers, which tell the older ones from the younger ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Accesses:
    """The accesses of one overlay, numbered in the order in which they began."""

    def __init__(self) -> None:
        self.next = 0  # the number of the next one
        self._running: dict[int, None] = {}  # oldest first

    @property
    def oldest(self) -> int:
        """The number of the oldest one that is running, or of the next one."""
        return next(iter(self._running), self.next)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """One access. Enter it after the look-up, without an await in between."""
        number = self.next
        self.next += 1
        self._running[number] = None
        try:
            yield
        finally:
            del self._running[number]
