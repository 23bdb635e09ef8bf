"""Who has a file open: whether anybody has, readers included, or whether anybody writes. Imports only this room.

Owns the questions to the kernel. Must not know what the file is. The kernel grants a write lease only if no other
descriptor of the file is open, and a read lease only if none is open for writing (fcntl(2), F_SETLEASE); it is released
at once. Locks would show only programs that take them, which a reader of a raw image need not do.

For an answer, this process must be the file's owner or have CAP_LEASE, and the file system must be local and have
leases.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal

from qedfs.host.procfs import filesystem_type

# File systems whose leases a server grants, which may refuse one for reasons of its own.
SERVED_TYPES = frozenset({"nfs", "nfs4", "cifs", "smb3"})


def open_elsewhere(path: str) -> bool | None:
    """Whether a process, this one included, has the file open; None if unknown."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _refuses_lease(fd, fcntl.F_WRLCK)
    finally:
        os.close(fd)


def open_for_writing(fd: int) -> bool | None:
    """Whether a process has the file of `fd` open for writing; None if unknown. `fd` itself must be open read-only."""
    return _refuses_lease(fd, fcntl.F_RDLCK)


def _refuses_lease(fd: int, kind: int) -> bool | None:
    """Whether the kernel refuses a lease because of another descriptor; None if it cannot tell."""
    try:
        if filesystem_type(fd) in SERVED_TYPES:
            return None
        # If a process opens the file during the lease, the kernel sends us a signal. The default SIGIO would kill us;
        # SIGURG is ignored (signal(7)).
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        return True if exc.errno == errno.EAGAIN else None
    return False
