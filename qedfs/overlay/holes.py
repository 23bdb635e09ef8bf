"""Finds the holes of the overlay file, where tables have no entries, so that a walk can skip them.

Owns the last extent as a cache. A sparse file of some KiB can claim terabytes of tables. Walked hole by hole instead of
entry by entry, it takes only the time for the data that it really has. Must not know which tables there are.
"""

from __future__ import annotations

from qedfs.overlay.storage import FileExtent, Storage


class Holes:
    """The holes of a file. The cached extent may be out of date after a write to the file."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._last = (0, FileExtent(0, hole=False))  # (start, extent) in one value, because threads share it

    def known(self, offset: int) -> bool:
        """Whether `at` can answer from the cache."""
        start, extent = self._last
        return start <= offset < extent.end

    def at(self, offset: int) -> int:
        """Bytes from `offset` to the end of the hole that it lies in; 0 if there may be data. May wait for the disk."""
        start, extent = self._last
        if not start <= offset < extent.end:
            extent = self._storage.extent(offset)
            self._last = (offset, extent)
        return extent.end - offset if extent.hole else 0
