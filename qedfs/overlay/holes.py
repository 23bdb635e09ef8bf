"""Where the tables of an overlay are holes of the file: there they have no entries, whatever size they claim.

Owns the memory of the extent that was looked at last. A sparse file of some KiB can claim tables of terabytes; looked
at hole by hole instead of entry by entry, it costs what is really in it. Must not know which tables there are.
"""

from __future__ import annotations

from qedfs.overlay.storage import FileExtent, Storage


class Holes:
    """What the file was like when it was looked at. Who writes to it must mind that a hole may be none any more."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._last = (0, FileExtent(0, hole=False))  # its start, and the rest: one value, as threads share it

    def known(self, offset: int) -> bool:
        """Whether `at` answers from memory."""
        start, extent = self._last
        return start <= offset < extent.end

    def at(self, offset: int) -> int:
        """Bytes of the hole that `offset` lies in, from there on; 0: there may be data. May wait for the disk."""
        start, extent = self._last
        if not start <= offset < extent.end:
            extent = self._storage.extent(offset)
            self._last = (offset, extent)
        return extent.end - offset if extent.hole else 0
