"""How many files this process may have open. Owns that limit; raising it needs no right, and is optional.

Each overlay takes two descriptors and each HTTP source up to 132. The soft limit is usually 1024, for the sake of
programs that use select(2), which knows no descriptors beyond. Nothing here does (trio and the sources use epoll,
libcurl uses poll), so the hard limit is taken, as daemons do; systemd sets it to 524288.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource

# Descriptors that overlays leave to the rest: /dev/fuse, the sources, control clients.
KEPT = 256
KEPT_SHARE = 4  # but no more than one in so many


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_room(fd: int) -> None:
    """Return if another overlay may be opened. `fd`: any that is open.

    Overlays that took the last descriptor would keep all others from being mounted, filled and asked about.

    Raises:
        OSError: EMFILE.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(fd)
    os.close(lowest_free)
    if soft != resource.RLIM_INFINITY and lowest_free >= soft - min(KEPT, soft // KEPT_SHARE):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
