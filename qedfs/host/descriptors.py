"""How many file descriptors this process may have, and how they are shared out between overlays, sources and the rest.

Owns the arithmetic; must not know who opens what. What is left out for want of descriptors costs itself only, but
whoever takes the last one costs everybody: then the folder cannot be listed, no client of the control socket is let in,
no other image reaches its source.

The soft limit is usually 1024, for the sake of programs that use select(2), which knows no descriptors beyond. Nothing
here does (trio and the sources use epoll, libcurl uses poll), so a mount takes the hard limit, as daemons do; systemd
sets it to 524288.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource

BASE = 24  # of a mount without overlays: libraries, the event loop, /dev/fuse, the folder, sockets, a child's pipes
KEPT = 64  # that overlays and sources leave to control clients, looks at the folder and what comes up
KEPT_SHARE = 8  # but no more than one in so many
OVERLAY = 2  # the file and its journal
SOURCE = 6  # of one over HTTP beside its connections: two epoll objects, and what libcurl wakes itself with
POOLS = 2  # of connections for each source
MOST_CONNECTIONS, FEWEST_CONNECTIONS = 64, 2  # of a pool
CONNECTIONS_SHARE = 128  # a pool gets one in so many


def raise_limit() -> None:
    """Raise the soft limit of open files to the hard one, which needs no right; a sandbox may forbid it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections() -> int:
    """That one pool of a source may have."""
    return max(FEWEST_CONNECTIONS, min(MOST_CONNECTIONS, _limit() // CONNECTIONS_SHARE))


def check_room(overlays: int, sources: int) -> None:
    """Return if there is room for so many overlays and sources, with all the connections that these may come to have.

    Raises:
        OSError: EMFILE.
    """
    limit = _limit()
    promised = BASE + OVERLAY * overlays + (SOURCE + POOLS * connections()) * sources
    if max(promised, _lowest_free()) > limit - min(KEPT, limit // KEPT_SHARE):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def _lowest_free() -> int:
    """As good as the number of those in use: the kernel gives out the lowest first."""
    free = os.open("/", os.O_PATH | os.O_CLOEXEC)
    os.close(free)
    return free
