"""Writes the marks of entries that were lost by a truncation (`truncation.py`) to the file.

Owns which marks have been written, which are durable, and which could not be written yet. Marks are not part of the
group commit; each is written as soon as it is found. Must not know why an entry is marked.
"""

from __future__ import annotations

from qedfs.errors import QedfsError
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.sectors import Write
from qedfs.overlay.storage import Storage


class TruncationMarks:
    """The marks of one overlay. `found` counts the calls of `write`; the caller reports when these are `secured`."""

    def __init__(self, storage: Storage, barriers: Barriers) -> None:
        self.found = 0
        self._secured = 0
        self._storage = storage
        self._barriers = barriers
        self._owed: list[Write] = []  # writes that have failed, with the content from when the marks were found
        self._closed = False

    def write(self, writes: list[Write]) -> bool:
        """Write sectors with marks, or keep them for later. Returns whether they have been written.

        They have to go into the page cache now. If we are killed before the next group commit, the file may have grown,
        and the next session would take unmarked entries for valid. The sectors kept for later have no entries of this
        session.
        """
        self.found += 1
        self._owed += writes
        if self._closed or self._barriers.failure is not None:
            return False  # nothing more is written to the file, so it does not grow
        try:
            self.write_owed()
        except QedfsError:
            return False
        return True

    def write_owed(self) -> None:
        """Write the sectors that could not be written before. Raises NoSpace if there is still no space for them."""
        while self._owed:
            offset, data = self._owed[0]
            self._storage.write(offset, [data])
            del self._owed[0]  # after the write, so that it stays in the list if that fails

    @property
    def unsecured(self) -> bool:
        """Whether there are marks that a power cut could lose."""
        return self.found != self._secured

    def secured(self, found: int) -> None:
        """Record a barrier after the marks up to `found`, whose value was read before that barrier."""
        self._secured = max(self._secured, found)

    def close(self) -> None:
        """Write nothing more."""
        self._closed = True
