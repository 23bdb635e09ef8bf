"""What the kernel tells in /proc: who is mounted where, on what an open file lies, which users this namespace knows.

A leaf; owns the parsing of these files. They are bytes: the names in them are other people's, in no encoding. Fields
end at single blanks and records at line feeds, and at nothing else. (A text file of Python ends its lines at carriage
returns too, and `str.split` splits at some twenty more characters: with such a one in the path of any mount, which any
user may choose, the table would fall to pieces for all.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TMPFS_TYPES = frozenset({"tmpfs", "ramfs"})

_TABLE = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-7]{3})")
_MOUNT_ID = re.compile(rb"^mnt_id:\s*([0-9]+)$", re.MULTILINE)
# "%pK: %08X %08X %08X %04X %02X %5lu PATH" (net/unix/af_unix.c); the path ends with the line, whatever is in it.
_SOCKET = re.compile(rb"^[0-9a-f]+: (?:[0-9A-F]+ ){5} *[0-9]+ (/.*)$", re.MULTILINE)


class MountLine(NamedTuple):
    """A line of mountinfo, proc(5)."""

    number: int
    device: str  # "0:57": no other file system has it for as long as this one lives, mounted or not
    place: bytes  # where it is mounted, as this process sees it
    kind: str  # "ext4", "fuse.qedfs"
    options: list[bytes]  # of the file system, as opposed to those of the mount


def mounts(table: bytes | None = None) -> Iterator[MountLine]:
    """All that is mounted, the later over the earlier. OSError: the kernel does not tell."""
    for line in (_TABLE.read_bytes() if table is None else table).split(b"\n"):
        fields = line.split(b" ")
        try:
            # Any number of optional fields stands before the dash.
            kind, _, options = fields[fields.index(b"-", 6) + 1 :][:3]
            number, device = int(fields[0]), fields[2].decode("ascii")
        except ValueError:
            continue  # the empty end of the file, or of a later kernel
        yield MountLine(number, device, _unescaped(fields[4]), os.fsdecode(_unescaped(kind)), options.split(b","))


def _unescaped(field: bytes) -> bytes:
    """Blank, tab, line feed, backslash and hash are octal there (mangle in fs/proc_namespace.c)."""
    return _OCTAL.sub(lambda octal: bytes([int(octal[1], 8) & 0xFF]), field)


def filesystem_type(path: Path | str | int) -> str:
    """The type of the file system that holds a path or an open file; "" if unknown. Asks nothing of an open file."""
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
    # Not by the device of stat(2): btrfs and overlayfs tell one that is in no table.
    number = mount_number(fd)
    return next((line.kind for line in mounts() if line.number == number), "")


def mount_number(fd: int) -> int:
    """Which mount an open file lies on, as in mountinfo; -1 if the kernel does not tell. OSError: there is no /proc."""
    found = _MOUNT_ID.search(Path(f"/proc/self/fdinfo/{fd}").read_bytes())
    return int(found[1]) if found else -1


def mount_user(place: bytes) -> int | None:
    """Whose file system is mounted at this path, by the uid that FUSE tells; None if there is none of FUSE."""
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
    """The paths of all Unix sockets of this network namespace. A path that holds a line feed shows as others do."""
    try:
        text = Path("/proc/self/net/unix").read_bytes() if table is None else table
    except OSError:
        return
    for found in _SOCKET.finditer(text):
        yield found[1]


def outer_user(uid: int, table: bytes | None = None) -> int:
    """The number that the user namespace around ours has for a user; -1 if it has none. Outside of one, the same."""
    try:
        text = Path("/proc/self/uid_map").read_bytes() if table is None else table
    except OSError:
        return uid
    for line in text.splitlines():
        inner, outer, count = map(int, line.split())
        if inner <= uid < inner + count:
            return outer + uid - inner
    return -1


def boot_id() -> str:
    """What names this run of the kernel: another value means that the page cache was lost in between."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
