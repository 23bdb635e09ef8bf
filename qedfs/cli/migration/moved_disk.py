"""Which disk of a running QEMU moves, as its monitor tells it.

Owns the choice of the disk, and the reading of query-block. Must not know the steps of a migration (`handover.py`).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from qedfs.cli.ui.layout import listed
from qedfs.control.qmp.client import Client
from qedfs.errors import UsageError, file_error

MOST_NAMED = 10


@dataclasses.dataclass(frozen=True, slots=True)
class MovedDisk:
    """A writable disk of the guest: the names that QEMU has for it, and its file on this host."""

    names: tuple[str, ...]
    path: str
    driver: str  # of its format, as QEMU calls it
    size: int  # bytes that the guest sees

    def __str__(self) -> str:
        return self.names[0]


def disks_of(qemu: Client) -> list[MovedDisk]:
    """The disks that a guest may write to."""
    return [
        MovedDisk(_names(device), _file_of(device["inserted"]), device["inserted"]["drv"], _size_of(device["inserted"]))
        for device in qemu.execute("query-block")
        if device.get("inserted") and not device["inserted"]["ro"]
    ]


def disk_meant(qemu: Client, wanted: str | None, path: str | None = None) -> MovedDisk:
    """The one that moves: `wanted`, a name that QEMU has for it, or its only one. `path`: its file, if given.

    Raises UsageError if it is unclear which one that is, or if its file is not on this host.
    """
    there = disks_of(qemu)
    found = [disk for disk in there if wanted is None or wanted in disk.names]
    if len(found) != 1:
        names = listed([str(disk) for disk in there], MOST_NAMED) or "none"
        if wanted is None:
            raise UsageError(f"{qemu.peer}: has not one writable disk: {names}; say with --disk which one moves")
        raise UsageError(f"{qemu.peer}: has no writable disk {wanted}; there is {names}")
    disk = found[0] if path is None else dataclasses.replace(found[0], path=path)
    if disk.path.startswith("json:"):
        raise UsageError(f"{qemu.peer}: does not tell the file of its disk {disk}; say it with --file")
    try:
        os.stat(disk.path)
    except OSError as exc:
        text = f"{disk.path}: {exc.strerror}; qedfs migrate runs on the host whose QEMU has this disk"
        raise file_error(text, exc) from exc
    return disk


def has_disk_on(qemu: Client, name: str) -> bool:
    """Whether a disk of this QEMU is a file of this name, in whatever folder."""
    files = [_file_of(device["inserted"]) for device in qemu.execute("query-block") if device.get("inserted")]
    # Of a disk behind other drivers, QEMU tells options in JSON, the file's name among them.
    return any(os.path.basename(file) == name or f'/{name}"' in file for file in files)


def _names(device: dict[str, Any]) -> tuple[str, ...]:
    """Of -drive: its id. Of -device: its id or place in the machine. Of -blockdev: the name of the node."""
    qdev = device.get("qdev", "")
    names = (device["device"], qdev.removesuffix("/virtio-backend").rsplit("/", 1)[-1], device["inserted"]["node-name"])
    return tuple(name for name in names if name)


def _file_of(inserted: dict[str, Any]) -> str:
    file: str = inserted["image"]["filename"]
    return file


def _size_of(inserted: dict[str, Any]) -> int:
    size: int = inserted["image"]["virtual-size"]
    return size
