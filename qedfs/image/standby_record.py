"""What the record of an overlay says of its standby: the way into it, what it expects of the source, and the way out.

Owns the conditions of these changes. Must not know what is read in standby, nor when it ends.
"""

from __future__ import annotations

import dataclasses
import logging

from qedfs.errors import QedfsError, ReadOnlyOverlay, SourceChanged
from qedfs.format.geometry import round_up
from qedfs.format.record import Pin, Record, Standby, digest
from qedfs.overlay.overlay import Overlay

log = logging.getLogger(__name__)

HAS_NO_BACKING = "%s: has no backing; it is not in standby"
WAS_ACTIVATED = "%s: was activated before; it is not in standby"


async def put_in_standby(path: str, overlay: Overlay) -> None:
    """Note in the record, durably, that the overlay is in standby, unless it is there or was activated before.

    An overlay without a backing has nothing to wait for, and is left as it is.

    Raises:
        QedfsError: it has clusters, of which nobody knows when they were read, or standby cannot be recorded.
    """
    if overlay.record.standby is not Standby.NEVER or overlay.backing is None:
        if not overlay.record.standby.waits:
            log.warning(HAS_NO_BACKING if overlay.backing is None else WAS_ACTIVATED, path)
        return
    if not overlay.writable:
        raise ReadOnlyOverlay(f"{path}: is not writable, so that nobody could know later that it is in standby")
    if not overlay.record.session:
        why = overlay.full or "it has no room for the record that says so"
        raise QedfsError(f"{path}: cannot be put in standby: {why}")
    await overlay.count_missing()
    if overlay.missing != overlay.geometry.clusters:
        raise QedfsError(
            f"{path}: has clusters already, which may be older than its backing will be at the end of the standby; "
            "make a new overlay: qedfs create --standby"
        )
    await overlay.change_record(_in_standby)


def _in_standby(record: Record) -> Record:
    # Of the version that was pinned only the size counts: the rest changes until the end of the standby.
    pin = None if record.pin is None else Pin(record.pin.backing, record.pin.size)
    return dataclasses.replace(record, standby=Standby.WAITING, pin=pin)


def check_size(name: str, overlay: Overlay, size: int) -> None:
    """Raise SourceChanged if a source of `size` bytes is not what this overlay expects. `name`: of the image."""
    pin = overlay.record.pin
    if pin is not None and pin.backing == digest(overlay.backing or ""):
        if size != pin.size:
            raise SourceChanged(f"{name}: its backing had {pin.size} bytes, and has {size} now")
    elif round_up(size, 512) != overlay.image_size:
        raise SourceChanged(f"{name}: its backing has {size} bytes, and the image {overlay.image_size}")


async def record_active(overlay: Overlay, pin: Pin | None) -> None:
    """Note, durably, that the overlay is active, and which version of its source it is filled from.

    Both at once: after a kill, an active overlay must not be filled from another version. Raises what
    `Overlay.change_record` raises, and NoSpace.
    """
    await overlay.ready()  # on a full disk the change would be remembered, but not be durable
    await overlay.change_record(
        lambda record: dataclasses.replace(record, standby=Standby.REVOCABLE, pin=pin or record.pin)
    )


async def record_waiting(overlay: Overlay) -> None:
    """Note, durably, that the overlay is in standby again after `record_active`. Nothing was kept or written since.

    Does nothing if the record does not say that it was activated.
    """
    if overlay.record.standby is not Standby.REVOCABLE:
        return
    # Of all records, the present one must not count, whatever becomes of this one.
    await overlay.change_record(_in_standby, revoke=False)


async def record_emptying(name: str, overlay: Overlay) -> None:
    """Note, durably, that the overlay goes back to standby, without anything that it has got since its activation.

    `name`: of the image. Writes that passed the gate are noted before this, or refused after it.

    Raises:
        QedfsError: a guest has written since, or it was not activated, or is complete; or what `record_active` raises.
    """
    await overlay.ready()  # as in `record_active`: the clusters are dropped next
    check_way_back(name, overlay)
    await overlay.change_record(_emptying)
    # The guest may have written while the change waited for its turn.
    if overlay.record.standby is not Standby.EMPTYING:
        check_way_back(name, overlay)


def check_way_back(name: str, overlay: Overlay) -> None:
    """Raise QedfsError if the overlay cannot go back to standby."""
    standby = overlay.record.standby
    if standby is not Standby.REVOCABLE:
        why = "a guest has written to it since it was activated" if standby is Standby.ACTIVE else "was not activated"
        if overlay.backing is None:
            raise QedfsError(
                f"{name}: is complete, and has no backing any more, so it cannot go back to standby; for another"
                " migration, make a new overlay: qedfs create --standby"
            )
        raise QedfsError(f"{name}: {why}; it stays active")


def _emptying(record: Record) -> Record:
    back = record.standby is Standby.REVOCABLE
    return dataclasses.replace(record, standby=Standby.EMPTYING) if back else record
