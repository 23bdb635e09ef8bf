"""Whether anybody has a file open, readers included. Imports only this room.

Owns the question to the kernel. Must not know what the file is. The kernel grants a lease for writing only if no other
descriptor of the file is open (fcntl(2), F_SETLEASE); it is released at once. Locks would show only programs that take
them, which a reader of a raw image need not do.
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
    """Whether a process, this one included, has the file open; None if unknown.

    This process must be the file's owner or have CAP_LEASE, and the file system must be local and have leases.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if filesystem_type(fd) in SERVED_TYPES:
            return None
        # If a process opens the file during the lease, the kernel sends us a signal. The default SIGIO would kill us;
        # SIGURG is ignored (signal(7)).
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        return True if exc.errno == errno.EAGAIN else None
    finally:
        os.close(fd)
    return False
