"""Activations that were given up because the overlay's disk hung, as the next server of the mount has to know them.

Owns what is told of them (`held.py`). Must not know how an activation proceeds (`cut_over.py`). Whoever asked for such
an activation was told that the image stays in standby, and the guest goes on at the source. This server takes the
record back once the disk has it (`CutOver`). If it is killed before that, the disk may have the record all the same:
then the next server takes it back, before it serves the image.
"""

from __future__ import annotations

from collections.abc import Mapping

from qedfs.image.standby_record import record_waiting
from qedfs.mount.held import HolderLink
from qedfs.overlay.overlay import Overlay

_KIND = "late/"  # and the inode number of the overlay


class LateRecords:
    """Those of one mount. `values`: what an earlier server has told of them."""

    def __init__(self, link: HolderLink, values: Mapping[str, str]) -> None:
        self._link = link
        self._left = {key for key in values if key.startswith(_KIND)}

    def note(self, overlay: Overlay) -> None:
        """Tell the next server that a record of this overlay must not count."""
        self._link.set(_key(overlay), "1")

    def forget(self, overlay: Overlay) -> None:
        """It does not count any more."""
        self._link.drop(_key(overlay))

    async def take_back(self, overlay: Overlay) -> None:
        """Do what the server before this one was killed in. Raises what `Overlay.change_record` raises."""
        key = _key(overlay)
        if key in self._left:
            await record_waiting(overlay)  # nothing was kept: no server has served it as active
            self._left.discard(key)
            self._link.drop(key)


def _key(overlay: Overlay) -> str:
    return f"{_KIND}{overlay.file_status().st_ino}"
