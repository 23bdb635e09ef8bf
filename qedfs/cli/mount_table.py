"""Queries about mounts: what is mounted at a path, why no server answers, who keeps it busy, and where copies are.

Owns the reason that a message gives, and the way out, if a mount does not answer or cannot be unmounted. Must not
change a mount.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from qedfs.cli.ui.layout import listed
from qedfs.errors import Inaccessible, NotMounted, QedfsError, UsageError, file_error
from qedfs.host.procfs import MountLine, filesystem_type, is_denied_privileges, mount_user, mounts
from qedfs.host.runtime import place_of
from qedfs.mount.mountpoint import NO_NEW_PRIVILEGES, MountInfo, is_dead, mount_info_at

FILESYSTEM = "fuse.qedfs"
SUFFIX = ".qed"


def mounted_at(mountpoint: str) -> MountInfo | None:
    """The file system mounted at this path, the topmost if there are several; None if there is none."""
    return mount_info_at(place_of(mountpoint))


def mounted_type(mountpoint: str) -> str | None:
    """The type of the file system mounted at this path; None if there is none."""
    found = mounted_at(mountpoint)
    return None if found is None else found.kind


def not_served(mountpoint: str) -> QedfsError:
    """Why no qedfs server answers for this path: because there can be none, because we may not look, or NotMounted."""
    kind = mounted_type(mountpoint)
    if kind == FILESYSTEM:
        return NotMounted(f"{mountpoint}: {_why_no_answer(mountpoint)}")
    if kind is not None:
        return UsageError(f"{mountpoint}: is a mount of type {kind}, not one of qedfs")
    try:
        mode = os.stat(mountpoint).st_mode
    except OSError as exc:
        return file_error(f"{mountpoint}: {_why_no_folder(exc)}", exc)
    if not stat.S_ISDIR(mode):
        return UsageError(f"{mountpoint}: is not a folder{_which_folder(mountpoint)}")
    return NotMounted(f"{mountpoint}: nothing is mounted there")


def _which_folder(path: str) -> str:
    """What to name instead of this file."""
    if filesystem_type(path) == FILESYSTEM:
        return f"; name the folder of the mount: {os.path.dirname(path) or '.'}"
    return "; name the folder where it is mounted, not the overlay" if path.endswith(SUFFIX) else ""


def _why_no_folder(exc: OSError) -> str:
    return "there is no such folder" if exc.errno == errno.ENOENT else str(exc.strerror)


def _why_no_answer(mountpoint: str) -> str:
    if is_dead(mountpoint):
        return f"the server of this mount has died; run: qedfs umount {mountpoint}"
    if (owner := _other_owner(mountpoint)) is not None:
        return f"is a mount of user {owner}; only that user and root can talk to its server"
    return (
        "the server of this mount does not answer here; was it started in a container, or with another XDG_RUNTIME_DIR?"
    )


def not_unmounted(mountpoint: str, said: str) -> QedfsError:
    """Why the command for it has not unmounted. `said`: its own words."""
    owner = _other_owner(mountpoint)
    if owner is not None:
        return Inaccessible(f"{mountpoint}: is a mount of user {owner}; only that user and root can unmount it")
    if os.getuid() != 0 and is_denied_privileges():
        said = f"{NO_NEW_PRIVILEGES} ({said})"
    return QedfsError(f"{mountpoint}: cannot be unmounted: {said}")


def user_of(overlay: str) -> str | None:
    """Who has an overlay open, in a line with the way out; None if nobody who has can be seen."""
    path = os.path.realpath(overlay)
    holders = {process.name: process for process in _running() if path in _places(process)}
    for line in mounts():
        place, source = os.fsdecode(line.place), os.fsdecode(line.source)
        if line.kind != FILESYSTEM or source not in (path, os.path.dirname(path)):
            continue
        pid = _server_pid(place)
        if pid in holders or not holders:
            by = f" by pid {pid}" if pid else ""
            return (
                f"{overlay}: is mounted at {place} already{by}; use that mount, or end it first: qedfs umount {place}"
            )
    if not holders:
        return None
    return f"{overlay}: is in use by {listed([_named(one) for one in holders.values()])}; close it there first"


def _server_pid(mountpoint: str) -> str | None:
    """The pid of the server of a mount; None if we cannot see it."""
    from qedfs.control.qmp.client import Client

    try:
        with Client.reach(mountpoint) as client:
            return str(client.server_pid) if client.server_pid else None
    except QedfsError:
        return None


def _other_owner(mountpoint: str) -> str | None:
    """Another user than ours, except for root, who has made the mount: "alice" or a number. None if it is ours."""
    uid = mount_user(os.fsencode(place_of(mountpoint)))
    if uid is None or os.getuid() in (0, uid):
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


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
    for process in _running():
        if any(_is_below(place, folder) for place in _places(process)):
            yield _named(process)


def _running() -> Iterator[Path]:
    """The folder in /proc of each process, except ours: where our working directory is, the user's shell is, too."""
    ours = str(os.getpid())
    return (path for path in Path("/proc").iterdir() if path.name.isdigit() and path.name != ours)


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
