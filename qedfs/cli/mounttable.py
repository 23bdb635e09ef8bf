"""What is mounted where, whether it lives, and who keeps it busy, as the kernel says."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from qedfs.errors import NotMounted, QedfsError, UsageError
from qedfs.mount.place import standing_at
from qedfs.runtime import place_of

FILESYSTEM = "fuse.qedfs"


def mounted_type(mountpoint: str) -> str | None:
    """The type of the file system mounted at this path, the topmost if there are several; None if there is none."""
    standing = standing_at(place_of(mountpoint))
    return None if standing is None else standing.kind


def is_dead(mountpoint: str) -> bool:
    """Whether the server of the mount has died."""
    try:
        # Not stat: the kernel would answer it from what the dead server said a moment ago.
        os.statvfs(mountpoint)
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def missing(mountpoint: str) -> QedfsError:
    """Why no server of ours answers for this path: a UsageError where none could, else NotMounted."""
    kind = mounted_type(mountpoint)
    if kind == FILESYSTEM:
        if is_dead(mountpoint):
            return NotMounted(f"{mountpoint}: the server of this mount has died; run: qedfs umount {mountpoint}")
        return NotMounted(
            f"{mountpoint}: the server of this mount does not answer here; was it started by another user, or in a "
            "container?"
        )
    if kind is not None:
        return UsageError(f"{mountpoint}: is a mount of type {kind}, not one of qedfs")
    if not os.path.isdir(mountpoint):
        what = "is not a folder" if os.path.lexists(mountpoint) else "there is no such folder"
        return UsageError(f"{mountpoint}: {what}")
    return NotMounted(f"{mountpoint}: nothing is mounted there")


def holders(mountpoint: str) -> list[str]:
    """Who has something below the mountpoint open, as "pid 123 (qemu)" and "/dev/loop0"; what we may see of it."""
    folder = place_of(mountpoint)
    return [*_processes(folder), *_loops(folder)]


def _processes(folder: str) -> Iterator[str]:
    ours = str(os.getpid())  # started where the user stands, which the line of the shell tells
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or process.name == ours:
            continue
        if any(_is_below(place, folder) for place in _places(process)):
            yield f"pid {process.name} ({_line(process / 'comm').decode(errors='replace')})"


def _places(process: Path) -> Iterator[str]:
    """Where a process is and what it has open. Reading these links asks nothing of the file systems they lead to."""
    try:
        links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
    except OSError:
        return
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue


def _loops(folder: str) -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if _is_below(os.fsdecode(_line(backing)), folder):
            yield f"/dev/{backing.parts[-3]}"


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _line(path: Path) -> bytes:
    """What a file of the kernel's holds, but for the end of its line. Blanks at its ends are part of a name."""
    try:
        return path.read_bytes().removesuffix(b"\n")
    except OSError:
        return b""
