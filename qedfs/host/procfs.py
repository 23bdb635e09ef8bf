"""Parsers for /proc: the mount table, the file system of an open file, Unix sockets, the uid map, the boot id.

Owns the syntax of these files. Must not know which mounts and sockets are ours: the callers choose. Works on bytes,
because the names in these files come from other users and have no known encoding. Only a single space ends a field and
only a line feed ends a record. (Python's text files also end lines at carriage returns, and `str.split` splits at some
twenty more characters. Any user can put such a character into the path of a mount, which would break the parsing of the
whole table.) Imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TMPFS_TYPES = frozenset({"tmpfs", "ramfs"})

_held: dict[int, str] = {}  # see `held_type`
_FDINFO_BYTES = 4096  # mnt_id is among the first lines; those of locks may follow
_TABLE = Path("/proc/self/mountinfo")
# Not compiled, as a short command uses few of them; `re` keeps what it has compiled.
_OCTAL = rb"\\([0-7]{3})"
_MOUNT_ID = rb"(?m)^mnt_id:\s*([0-9]+)$"
# "%pK: %08X %08X %08X %04X %02X %5lu PATH" (net/unix/af_unix.c); the path extends to the end of the line.
_SOCKET = rb"(?m)^[0-9a-f]+: (?:[0-9A-F]+ ){5} *[0-9]+ (/.*)$"


class MountLine(NamedTuple):
    """A line of mountinfo, proc(5)."""

    number: int
    device: str  # "0:57": unique to this file system while it is mounted anywhere, and then free for another one
    place: bytes  # where it is mounted, as this process sees it
    kind: str  # "ext4", "fuse.qedfs"
    source: bytes  # what is mounted: "/dev/sda1"; for our mounts the path of the overlay or folder
    options: list[bytes]  # the file system's ("super options"), not the mount's


def mounts(table: bytes | None = None) -> Iterator[MountLine]:
    """The mount table, in mount order: a later mount covers an earlier one. Raises OSError if it cannot be read."""
    for line in (_TABLE.read_bytes() if table is None else table).split(b"\n"):
        fields = line.split(b" ")
        try:
            # Any number of optional fields stands before the dash.
            kind, source, options = fields[fields.index(b"-", 6) + 1 :][:3]
            number, device = int(fields[0]), fields[2].decode("ascii")
        except ValueError:
            continue  # the empty last line, or a format that only a later kernel has
        place, name = _unescaped(fields[4]), os.fsdecode(_unescaped(kind))
        yield MountLine(number, device, place, name, _unescaped(source), options.split(b","))


def _unescaped(field: bytes) -> bytes:
    """Decode the octal escapes of space, tab, line feed, backslash and hash (mangle() in fs/proc_namespace.c)."""
    if b"\\" not in field:
        return field
    return re.sub(_OCTAL, lambda octal: bytes([int(octal[1], 8) & 0xFF]), field)


def filesystem_type(path: Path | str | int) -> str:
    """The type of the file system of a path or an open file; "" if unknown.

    For an open file this sends no request to the file system, which may hang.
    """
    try:
        if isinstance(path, int):
            return _type_of(path)
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            return _type_of(fd)
        finally:
            os.close(fd)
    except OSError:
        return ""


def _type_of(fd: int) -> str:
    # Not by st_dev of stat(2): btrfs and overlayfs report devices that are not in mountinfo.
    number = mount_number(fd)
    kind = _held.get(number)
    return next((line.kind for line in mounts() if line.number == number), "") if kind is None else kind


@contextlib.contextmanager
def held_type(fd: int) -> Iterator[None]:
    """In the block, know the type of the file system of `fd`, an open file, without reading the mount table again.

    The table may be long. As long as the file is open, the kernel gives the number of its mount to no other.
    """
    number = -1
    with contextlib.suppress(OSError):
        number = mount_number(fd)
    known = {number: kind} if number >= 0 and (kind := _type_of(fd)) else {}
    _held.update(known)
    try:
        yield
    finally:
        for one in known:
            _held.pop(one, None)


def mount_number(fd: int) -> int:
    """The mount id, as in mountinfo, of an open file; -1 if the kernel does not report it. OSError without /proc."""
    with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
        found = re.search(_MOUNT_ID, file.read(_FDINFO_BYTES))
    return int(found[1]) if found else -1


def mount_user(place: bytes) -> int | None:
    """The uid that mounted the FUSE file system at this path; None if no FUSE file system is mounted there."""
    try:
        found = [line for line in mounts() if line.place == place]
    except OSError:
        return None
    for option in found[-1].options if found else ():
        name, _, value = option.partition(b"=")
        if name == b"user_id":
            return int(value)
    return None


def sockets(table: bytes | None = None) -> Iterator[bytes]:
    """The paths of all Unix sockets of this network namespace.

    The kernel does not escape them: a line feed in a path cuts it short, and what follows may look like another socket.
    """
    try:
        text = Path("/proc/self/net/unix").read_bytes() if table is None else table
    except OSError:
        return
    for found in re.finditer(_SOCKET, text):
        yield found[1]


def outer_user(uid: int, table: bytes | None = None) -> int:
    """Map a uid of our user namespace to its parent's; -1 if unmapped. In the initial namespace, the same uid."""
    try:
        text = Path("/proc/self/uid_map").read_bytes() if table is None else table
    except OSError:
        return uid
    for line in text.splitlines():
        inner, outer, count = map(int, line.split())
        if inner <= uid < inner + count:
            return outer + uid - inner
    return -1


def is_denied_privileges(status: bytes | None = None) -> bool:
    """Whether setuid programs that this process starts stay as weak as it is (PR_SET_NO_NEW_PRIVS)."""
    try:
        text = Path("/proc/self/status").read_bytes() if status is None else status
    except OSError:
        return False
    return re.search(rb"(?m)^NoNewPrivs:\t1$", text) is not None


def waits_for_disk(pid: int) -> bool:
    """Whether a thread of a process waits for a disk, or for a frozen file system (state D, proc(5))."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            if Path(f"/proc/{pid}/task/{thread}/stat").read_bytes().rpartition(b") ")[2].startswith(b"D"):
                return True
    return False


def boot_id() -> str:
    """The kernel's id of this boot: if it differs from a stored one, the page cache has been lost since."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
