"""Which qedfs mounts there are: those of this user, for root those of all users.

Owns the search and the choice of the mount that a user means without naming it. Reads the kernel's tables only, so no
mount and no server can delay it. Must not know what a mount serves, nor whether its server answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from qedfs.cli.mount_table import FILESYSTEM
from qedfs.cli.ui.layout import listed
from qedfs.errors import NotMounted, UsageError
from qedfs.host.procfs import MountLine, mounts
from qedfs.host.runtime import with_sockets

MOST_NAMED = 10  # names in a message


class FoundMount(NamedTuple):
    """A mounted file system of qedfs."""

    mountpoint: str  # the path that its server was started with
    source: str  # the overlay, or the folder of overlays
    user: int  # the uid that mounted it
    group: int  # its gid
    copies: tuple[str, ...]  # the other places where it is mounted, such as those of mount --bind


def qedfs_mounts(user: int | None = None, table: Iterable[MountLine] | None = None) -> list[FoundMount]:
    """The mounts of this user, in mount order; of all users if this is root, or only those of `user`.

    Completion of mountpoints uses this as well: it takes about a millisecond. Raises OSError if the table of mounts
    cannot be read.
    """
    if user is None and os.getuid() != 0:
        user = os.getuid()
    places: dict[tuple[str, bytes, int, int], list[str]] = {}
    for line in mounts() if table is None else table:
        if line.kind == FILESYSTEM and (user is None or _number(line, b"user_id") == user):
            # Not by the device alone: the kernel reuses the numbers, and this table is not read at one instant.
            key = (line.device, line.source, _number(line, b"user_id"), _number(line, b"group_id"))
            places.setdefault(key, []).append(os.fsdecode(line.place))
    return [
        FoundMount(first, os.fsdecode(source), uid, gid, tuple(others))
        for (_, source, uid, gid), (first, *others) in zip(places, map(_original_first, places.values()), strict=True)
    ]


def mount_meant(mountpoint: str | None) -> str:
    """The mountpoint that the user has named, or that of his only mount.

    Raises:
        NotMounted: he has none.
        UsageError: he has several.
    """
    if mountpoint is not None:
        return mountpoint
    # Also for root: a command that omits the name is about a mount of one's own.
    found = [mount.mountpoint for mount in qedfs_mounts(os.getuid())]
    if not found:
        raise NotMounted("this user has no mount; qedfs mount OVERLAY MOUNTPOINT makes one, qedfs list shows all")
    if len(found) > 1:
        raise UsageError(f"this user has {len(found)} mounts: {listed(found, MOST_NAMED)}; name the one that you mean")
    return found[0]


def _number(line: MountLine, name: bytes) -> int:
    """The value of an option such as user_id=1000; -1 if it is absent."""
    for option in line.options:
        key, _, value = option.partition(b"=")
        if key == name and value.isdigit():
            return int(value)
    return -1


def _original_first(places: list[str]) -> list[str]:
    """The place that has a server's socket goes first, if the file system is mounted at several places.

    The table does not tell the original from its copies. With shared propagation, not even the order does.
    """
    if len(places) < 2:
        return places
    served = with_sockets(places)
    return sorted(places, key=lambda place: place not in served)  # stable
