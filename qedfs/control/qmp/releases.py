"""The event about an image that was released: others may open its overlay now.

Owns which releases the clients have been told of. Must not know how an image is released.
"""

from __future__ import annotations

from collections.abc import Mapping

from qedfs.control.qmp.block_job import Emit
from qedfs.control.qmp.jobs import SUFFIX


class Releases:
    """The releases that were told."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._told: set[str] = set()

    def sync(self, released: Mapping[str, str]) -> None:
        """Send the events that are due. `released`: overlays by the names of their images."""
        self._told &= released.keys()
        for name in released.keys() - self._told:
            self._told.add(name)
            self._emit("X_QEDFS_RELEASED", {"device": name.removesuffix(SUFFIX), "overlay": released[name]})
