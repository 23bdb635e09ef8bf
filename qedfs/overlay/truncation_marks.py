"""The marks of entries that a cut file has lost (`truncation.py`), on their way into the file.

Owns which marks the file has, which have a barrier after them, and which could not be written yet. A mark is no entry
of this session: it is written as soon as it is found, outside the group commit. Must not know why an entry is marked.
"""

from __future__ import annotations

from qedfs.errors import QedfsError
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.sectors import Write
from qedfs.overlay.storage import Storage


class TruncationMarks:
    """Of one overlay. `found` counts the times that there were some; the caller tells which of them are `secured`."""

    def __init__(self, storage: Storage, barriers: Barriers) -> None:
        self.found = 0
        self._secured = 0
        self._storage = storage
        self._barriers = barriers
        self._owed: list[Write] = []  # that could not be written, as they were when they were found
        self._closed = False

    def write(self, writes: list[Write]) -> bool:
        """Write marked sectors, or owe them; returns whether they are written.

        Into the page cache, and now: a kill before the next group may find the file grown, and the next session would
        take for good what was not marked. What is owed has no entries of this session.
        """
        self.found += 1
        self._owed += writes
        if self._closed or self._barriers.failure is not None:
            return False  # the file gets nothing more, and does not grow
        try:
            self.write_owed()
        except QedfsError:
            return False
        return True

    def write_owed(self) -> None:
        """Write what could not be written before. NoSpace: there is still no room for it."""
        while self._owed:
            offset, data = self._owed[0]
            self._storage.write(offset, [data])
            del self._owed[0]  # after the write: one that fails is owed further on

    @property
    def unsecured(self) -> bool:
        """Whether there are marks that the next power cut could take."""
        return self.found != self._secured

    def secured(self, found: int) -> None:
        """There was a barrier after the marks up to this value of `found`, which was read before that barrier."""
        self._secured = max(self._secured, found)

    def close(self) -> None:
        """Write nothing more."""
        self._closed = True
