"""What a command does while one server of a mount takes over from another: it waits for the next one.

Owns the way to tell a mount without a server from one that is between two. Must not know the commands.
"""

from __future__ import annotations

import math
import time

from qedfs.cli.mount_table import FILESYSTEM, mounted_type, not_served
from qedfs.control.qmp.client import Client, NotServed
from qedfs.errors import TimedOut
from qedfs.host.runtime import is_held, mount_places

PATIENCE_SECONDS = 30.0  # most take less than one; a busy machine, or many uncommitted entries, need longer
LOOK_SECONDS = 0.05


def is_between_servers(mountpoint: str) -> bool:
    """Whether a mount is there that somebody holds, although no server answers: another one is about to."""
    return mounted_type(mountpoint) == FILESYSTEM and any(map(is_held, mount_places(mountpoint)))


def reach_server(mountpoint: str, *, deadline: float = math.inf) -> Client:
    """Connect to the server of a mount and negotiate; waits for the next server if there is none just now.

    Raises:
        NotMounted: there is none, and there will be none.
        TimedOut: it does not reply, or the next one takes too long.
        UsageError: the path cannot be a qedfs mount.
    """
    patience = min(deadline, time.monotonic() + PATIENCE_SECONDS)
    while True:
        try:
            return Client.connect(mountpoint, deadline=deadline)
        except NotServed as exc:
            if not is_between_servers(mountpoint):
                raise not_served(mountpoint) from exc
            if time.monotonic() >= patience:
                raise TimedOut(f"{mountpoint}: another server takes the mount over, and does not answer yet") from exc
        time.sleep(LOOK_SECONDS)
