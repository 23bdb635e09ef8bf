"""Evicts a file from the page cache, so that the next read shows what is on the disk.

Owns the two system calls. Must not know what the file is.

After a failed write-back, Linux keeps the page, marks it clean and reports the error once (ext4, XFS and btrfs alike on
6.18). From then on reads show bytes that the disk does not have, further fdatasyncs succeed, and nothing writes the
page again. Only a read from the disk shows what is there.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time

_CACHESTAT = 451  # Linux 6.5; the same number on all architectures of Debian and Fedora
_RANGE = struct.Struct("=QQ")  # struct cachestat_range: offset, length; length 0 means to the end of the file
_STATISTICS = struct.Struct("=5Q")  # struct cachestat, in pages: cached, dirty, writeback, evicted, recently evicted
_TRIES = 5
_PAUSE_SECONDS = 0.02


def evict(fd: int) -> bool:
    """Drop all clean pages of a file. Returns whether none is left, as far as the kernel can tell (Linux 6.5 or later).

    Pages cannot be dropped while they are dirty, or while another process maps or reads them.
    """
    for last in range(_TRIES):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not _cached_pages(fd):
            return True
        if last < _TRIES - 1:
            time.sleep(_PAUSE_SECONDS)
    return False


def _cached_pages(fd: int) -> int:
    """How many pages of the file are in memory; 0 if the kernel cannot tell."""
    found = ctypes.create_string_buffer(_STATISTICS.size)
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(ctypes.c_long(_CACHESTAT), ctypes.c_uint(fd), _RANGE.pack(0, 0), found, ctypes.c_uint(0)):
        return 0
    return int(_STATISTICS.unpack(found.raw)[0])
