"""Opens the file of an overlay, with the locks that keep other programs from writing to it, or says why it cannot.

Owns the checks of the type, QEMU's byte locks, and the messages. Must not know what is done with the descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import stat
import struct

from qedfs.errors import BadOverlay, InUse, QedfsError, file_error

# QEMU's image locks (block/file-posix.c): byte 100+i says "I use permission i", 200+i "I do not share it".
_LOCK_USES, _LOCK_UNSHARED = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")


def open_file(path: str, *, writable: bool, locked: bool, dir_fd: int | None) -> int:
    """A descriptor of the file. See `FileStorage.open`."""
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path if dir_fd is None else os.path.basename(path), flags, dir_fd=dir_fd)
    except OSError as exc:
        raise _open_error(path, exc, writable=writable) from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadOverlay(f"{path}: is not a regular file")
        if locked:
            _lock_as_qemu(fd, path, writable=writable)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_error(path: str, exc: OSError, *, writable: bool) -> QedfsError:
    if exc.errno == errno.ELOOP:
        return BadOverlay(f"{path}: is a symbolic link; name the overlay itself")
    if exc.errno in (errno.ENXIO, errno.EISDIR):
        return BadOverlay(f"{path}: is not a regular file")
    text = f"{path}: {exc.strerror}"
    if exc.errno == errno.EACCES:
        text += f"; {_access(path)}"
    if exc.errno == errno.EACCES and writable:
        text += "; the overlay must be writable to keep what is fetched"
    return file_error(text, exc)


def _access(path: str) -> str:
    """Who may access a file that was refused to us, in words."""
    try:
        found = os.stat(path)
    except OSError:
        return "a folder above it lets this user not through"
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    return f"it belongs to {owner} and has the mode {stat.S_IMODE(found.st_mode):04o}"


def _lock_as_qemu(fd: int, path: str, *, writable: bool) -> None:
    """Take QEMU's shared byte locks, then check whether another program's permissions conflict with ours.

    OFD locks belong to the open file, not to the process, so two openings in the same process conflict, too.
    """
    uses = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
    for byte in [_LOCK_USES + p for p in uses] + [_LOCK_UNSHARED + p for p in (_WRITE, _RESIZE)]:
        _ofd_lock(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
    conflicts = [_LOCK_UNSHARED + p for p in uses] + [_LOCK_USES + p for p in (_WRITE, _RESIZE)]
    if any(_ofd_lock(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK for byte in conflicts):
        text = f"{path}: is in use by another program (QEMU or qedfs); close it there first"
        raise InUse(text, overlay=path)


def _ofd_lock(fd: int, command: int, kind: int, byte: int) -> int:
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    return int(_FLOCK.unpack(fcntl.fcntl(fd, command, request))[0])
