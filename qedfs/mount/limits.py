"""How many files this process may have open. Owns raising that limit, which needs no right and is optional.

The soft limit is usually 1024, for the sake of programs that use select(2), which knows no descriptors beyond. Nothing
here does (trio and the sources use epoll, libcurl uses poll), so the hard limit is taken, as daemons do; systemd sets
it to 524288. How they are shared out is in `descriptors.py`.
"""

from __future__ import annotations

import contextlib
import resource


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
