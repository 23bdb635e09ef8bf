"""Queries about mounts: what is mounted at a path, why no server answers, who keeps it busy, and where copies are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qedfs.errors import NotMounted, QedfsError, UsageError
from qedfs.host.procfs import MountLine, mounts
from qedfs.host.runtime import place_of
from qedfs.mount.mountpoint import MountInfo, is_dead, mount_info_at

FILESYSTEM = "fuse.qedfs"


def mounted_at(mountpoint: str) -> MountInfo | None:
    """The file system mounted at this path, the topmost if there are several; None if there is none."""
    return mount_info_at(place_of(mountpoint))


def mounted_type(mountpoint: str) -> str | None:
    """The type of the file system mounted at this path; None if there is none."""
    found = mounted_at(mountpoint)
    return None if found is None else found.kind


def not_served(mountpoint: str) -> QedfsError:
    """Why no qedfs server answers for this path: a UsageError if there cannot be one, otherwise NotMounted."""
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
    """Who has a file below the mountpoint open, as "pid 123 (qemu)" or "/dev/loop0", as far as we may see it."""
    folder = place_of(mountpoint)
    return [*_processes(folder), *_loops(folder)]


def copies(mounted: MountInfo) -> tuple[list[str], list[str]]:
    """Where else a file system is mounted: paths in our mount namespace, and holders in other namespaces.

    An empty `source` matches any.

    `mount --bind` makes a copy of a mount. So does anything that creates a mount namespace: unshare, a container, a
    sandboxed service. Of the namespaces we see only those in /proc. Each is named by its oldest process, as "pid 123
    (sleep)".
    """

    # Not the device number alone: after the last unmount the kernel gives it to whatever is mounted next.
    def is_copy(line: MountLine) -> bool:
        return (line.device, line.kind) == mounted[:2] and mounted.source in (b"", line.source)

    places = [os.fsdecode(line.place) for line in mounts() if is_copy(line)]
    found = {_namespace(Path("/proc/self"))}
    holders = []
    for process in sorted((path for path in Path("/proc").iterdir() if path.name.isdigit()), key=lambda p: int(p.name)):
        namespace = _namespace(process)
        if namespace and namespace not in found:
            found.add(namespace)
            if any(map(is_copy, mounts(_table(process)))):
                holders.append(_named(process))
    return places, holders


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns" / "mnt")
    except OSError:
        return ""  # it has ended, or we may not access it


def _table(process: Path) -> bytes:
    try:
        return (process / "mountinfo").read_bytes()
    except OSError:
        return b""


def _named(process: Path) -> str:
    return f"pid {process.name} ({_line(process / 'comm').decode(errors='replace')})"


def _processes(folder: str) -> Iterator[str]:
    ours = str(os.getpid())  # not listed: if our working directory is there, so is that of the user's shell
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or process.name == ours:
            continue
        if any(_is_below(place, folder) for place in _places(process)):
            yield _named(process)


def _places(process: Path) -> Iterator[str]:
    """The working directory, root and open files of a process. Sends no request to their file systems."""
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
    """The content of a kernel file without the final line feed. Blanks may be part of a name, so they stay."""
    try:
        return path.read_bytes().removesuffix(b"\n")
    except OSError:
        return b""
