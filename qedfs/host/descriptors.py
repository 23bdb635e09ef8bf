"""The budget of file descriptors: the limit of this process, and its shares for overlays, sources and everything else.

Owns the arithmetic; must not know who opens what. An overlay that is refused for lack of descriptors affects only
itself. An overlay that takes the last descriptor affects all of them: the folder cannot be listed, the control socket
cannot accept a client, and no other image reaches its source.

The soft limit is usually 1024, for the sake of programs that use select(2), which cannot handle descriptors of 1024 and
above. Nothing here uses select (trio and the sources use epoll, libcurl uses poll). So a mount raises its soft limit to
the hard limit, as daemons do; systemd sets the hard limit to 524288.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource

BASE = 24  # a mount without overlays: libraries, the event loop, /dev/fuse, the folder, sockets, a child's pipes
RESERVED = 64  # kept free for control clients, folder scans and for anything unforeseen
RESERVED_FRACTION = 8  # but reserve no more than 1/8 of the limit
OVERLAY = 3  # per overlay: the file, its probe (`write_probe.py`) and its journal
SOURCE = 6  # per HTTP source, connections excluded: two epoll objects and libcurl's wakeup descriptors
POOLS = 2  # connection pools per source
MOST_CONNECTIONS, FEWEST_CONNECTIONS = 64, 2  # per pool
CONNECTIONS_FRACTION = 128  # a pool gets 1/128 of the limit


def raise_limit() -> None:
    """Raise the soft limit on open files to the hard limit. This needs no privilege, but a sandbox may forbid it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections() -> int:
    """How many connections one pool of a source may open."""
    return max(FEWEST_CONNECTIONS, min(MOST_CONNECTIONS, _limit() // CONNECTIONS_FRACTION))


def check_room(overlays: int, sources: int) -> None:
    """Check that the limit allows this number of overlays and sources, including the sources' connections.

    Raises:
        OSError: EMFILE if it does not.
    """
    limit = _limit()
    promised = BASE + OVERLAY * overlays + (SOURCE + POOLS * connections()) * sources
    if max(promised, _lowest_free()) > limit - min(RESERVED, limit // RESERVED_FRACTION):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def _lowest_free() -> int:
    """The lowest free descriptor, an estimate of how many are in use: the kernel always assigns the lowest."""
    free = os.open("/", os.O_PATH | os.O_CLOEXEC)
    os.close(free)
    return free
