"""fallocate(2): reserves the space of a part of a file, or gives it back. Python has only posix_fallocate.

Owns the call. Must not know files nor clusters. Imports nothing of the project.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

# <linux/falloc.h>
KEEP_SIZE = 1
PUNCH_HOLE = 2 | KEEP_SIZE  # the second must go with it


def fallocate(fd: int, mode: int, offset: int, size: int) -> int:
    """Returns 0 or the errno. Releases the interpreter's lock while it waits for the file system."""
    return _call()(fd, mode, offset, size)


@functools.cache
def _call() -> Callable[[int, int, int, int], int]:
    """The function of the C library. To look it up takes 40 us, during which no other thread runs Python."""
    import ctypes  # here, because loading it takes 4 ms

    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return lambda fd, mode, offset, size: ctypes.get_errno() if call(fd, mode, offset, size) else 0
