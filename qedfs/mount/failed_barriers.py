"""Carries the failure of an overlay's barrier from one server of a mount to the next.

Owns its key among what servers tell each other. The next server opens the overlay anew, and its barriers succeed: they
say nothing of the writes that were lost. So it has the failure of the earlier one. Otherwise the fsync of a guest, and
the end of the mount, would succeed although answered writes are gone.
"""

from __future__ import annotations

from collections.abc import Mapping

from qedfs.mount.held import HolderLink
from qedfs.mount.served import Served


def note(link: HolderLink, served: Served) -> None:
    """Tell the next server if a barrier of the overlay has failed."""
    if link and served.image is not None and (failure := served.image.overlay.failure) is not None:
        link.set(f"failed/{served.inode}", str(failure))


def restore(values: Mapping[str, str], served: Served) -> None:
    """Let an overlay that was just opened have the failure that it had."""
    if served.image is not None and (text := values.get(f"failed/{served.inode}")) is not None:
        served.image.overlay.inherit_failure(text)
