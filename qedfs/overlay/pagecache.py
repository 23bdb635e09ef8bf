"""The page cache of one file: let go of it, so that the disk answers the next read.

Owns the two system calls. Must not know what the file is.

After a write-back that failed, Linux keeps the page, marks it clean and reports the error once (ext4, XFS and btrfs
alike on 6.18). From then on every read shows bytes that the disk does not have, every further fdatasync succeeds, and
nothing writes the page again. Only a read from the disk tells what is there.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time

_CACHESTAT = 451  # Linux 6.5; one number on all architectures that Debian and Fedora have
_RANGE = struct.Struct("=QQ")  # struct cachestat_range: offset, length; length 0 is to the end of the file
_STATISTICS = struct.Struct("=5Q")  # struct cachestat, of pages: cached, dirty, under write-back, evicted, lately so
_TRIES = 5
_PAUSE_SECONDS = 0.02


def evict(fd: int) -> bool:
    """Drop all clean pages of a file; whether none is left, as far as the kernel can tell (Linux 6.5 and newer).

    Pages stay while they are dirty, and while another process maps or is just reading them.
    """
    for last in range(_TRIES):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not _cached_pages(fd):
            return True
        if last < _TRIES - 1:
            time.sleep(_PAUSE_SECONDS)
    return False


def _cached_pages(fd: int) -> int:
    """Pages of the file that are in memory; 0 where the kernel does not tell."""
    found = ctypes.create_string_buffer(_STATISTICS.size)
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(ctypes.c_long(_CACHESTAT), ctypes.c_uint(fd), _RANGE.pack(0, 0), found, ctypes.c_uint(0)):
        return 0
    return int(_STATISTICS.unpack(found.raw)[0])
