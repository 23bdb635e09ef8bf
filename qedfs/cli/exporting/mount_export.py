"""The image of a mount goes into a raw file or into standard output, as it is at one moment, while the mount serves it.

1. Where the file system can share blocks, the server takes a snapshot of the overlay (`mount/snapshot.py`), and that is
   exported as any overlay, then removed. Guests write on.
2. Otherwise the file in the mount is read (`image_export.py`), which fails if anybody writes to it meanwhile.

Owns that choice, and the name and the end of the snapshot. Must not know how bytes are copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import BinaryIO

from qedfs.cli.exporting.image_export import export_image
from qedfs.cli.exporting.overlay_export import Export, export_overlay
from qedfs.cli.served_images import Image, check_served, fetch, stem
from qedfs.cli.takeovers import Unanswered, lasting_client
from qedfs.control.monitoring.status import STANDBY
from qedfs.control.qmp.client import Client
from qedfs.errors import InStandby, NotMounted, QedfsError
from qedfs.units import format_size


@dataclasses.dataclass(frozen=True, slots=True)
class MountedImage:
    """An image of a mount. `read_from`: "snapshot", or "image" if that is read through the mount."""

    overlay: str
    read_from: str
    write: Callable[[BinaryIO | None], Awaitable[dict[str, int]]]


@contextlib.contextmanager
def mounted_image(mountpoint: str, image: str, export: Export) -> Iterator[MountedImage]:
    """The image that the user means, ready to be written within the block.

    Raises:
        NotMounted, UsageError: there is no such mount, or image.
        InStandby: its bytes may still change.
        QedfsError: something is missing, and is not to be fetched.
    """
    with lasting_client(mountpoint) as client:
        found = fetch(client, image, mountpoint)[0]
        check_served(found)
        _check(found, with_backing=export.asking.with_backing)
        snapshot, reason = _snapshot(client, found)
    name, overlay = os.path.join(mountpoint, found["name"]), found["overlay"]
    if snapshot is None:
        yield MountedImage(overlay, "image", functools.partial(export_image, name, reason, export))
        return
    try:
        of_snapshot = dataclasses.replace(export, path=snapshot, name=name)
        yield MountedImage(overlay, "snapshot", functools.partial(export_overlay, of_snapshot))
    finally:
        os.unlink(snapshot)


def _check(found: Image, *, with_backing: bool) -> None:
    if found["state"] == STANDBY:
        raise InStandby(f"{found['name']}: is in standby: its bytes may still change; activate it first")
    missing = found["total"] - found["populated"]
    if found["backing"] is not None and missing and not with_backing:
        raise QedfsError(
            f"{found['name']}: {format_size(missing)} is still missing; wait until it is complete (qedfs wait), or use"
            " --with-backing"
        )


def _snapshot(client: Client, found: Image) -> tuple[str | None, str]:
    """The path of a snapshot; or None, and why there is none."""
    # In the folder of the overlay: there its backing has the same name. Without .qed, so that no mount serves it.
    path = os.path.join(os.path.dirname(found["overlay"]), f".qedfs-{stem(found['name'])}-{secrets.token_hex(4)}")
    try:
        client.execute("x-qedfs-snapshot", device=stem(found["name"]), file=path)
    except Unanswered:
        with contextlib.suppress(OSError):
            os.unlink(path)  # that server has ended, so no snapshot will appear later
        raise
    except NotMounted:
        raise
    except QedfsError as exc:
        return None, str(exc).removeprefix(f"{path}: ").partition(";")[0]
    return path, ""
