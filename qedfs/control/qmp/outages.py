"""The events about sources that are away: one when an image's source goes, one when it is back.

Owns the list of outages that were reported. Must not know how they are noticed (`image/outage.py`), nor the clients.
"""

from __future__ import annotations

from collections.abc import Iterable

from qedfs.control.port import ServedImage
from qedfs.control.qmp.block_job import Emit
from qedfs.control.qmp.jobs import device_name
from qedfs.image.condition import Cause, Trouble
from qedfs.image.image import Image


class Outages:
    """The outages that were reported, and not their end."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._told: dict[Image, float] = {}  # since when, in seconds since 1970

    def sync(self, everything: Iterable[ServedImage]) -> None:
        """Send the events that are due. An image that has left the mount, or is complete, needs no second event."""
        served = {found.image: found for found in everything if found.image is not None and not found.image.complete}
        for image in self._told.keys() - served.keys():
            del self._told[image]
        for image, found in served.items():
            trouble = next((one for one in found.troubles if one.cause is Cause.SOURCE_AWAY), None)
            if trouble is not None and image not in self._told:
                self._told[image] = trouble.since
                self._send("X_QEDFS_SOURCE_AWAY", found, image, trouble.since, trouble)
            elif trouble is None and image in self._told:
                self._send("X_QEDFS_SOURCE_BACK", found, image, self._told.pop(image), None)

    def _send(self, name: str, found: ServedImage, image: Image, since: float, trouble: Trouble | None) -> None:
        """`since`: seconds since 1970."""
        error = {} if trouble is None else {"error": str(trouble.error)}
        backing = "" if image.source is None else str(image.source.location)
        self._emit(name, {"device": device_name(found), "backing": backing, "since": round(since, 3), **error})
