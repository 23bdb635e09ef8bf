"""A handler for writes in libfuse's table, before pyfuse3's: writes from libfuse's own buffer, and replies at once.

Owns how the bytes of a write get from libfuse to the images. Must not know images, nor how a handler gets into the
table (`more_operations.py`).

pyfuse3's handler copies what a guest writes into a `bytes` object, and creates coroutines for each write. Most writes
need neither: they go to the page cache, without an await.

The buffer is valid until the handler returns, so its view is released then. All other writes are left to pyfuse3's
handler, which copies. So is one that fails: pyfuse3's handler repeats it, which puts the same bytes in the same place,
and replies with the error. So each write has exactly one reply.

libfuse passes the handle of the open file in struct fuse_file_info (fuse_common.h). The kernel sends it in front of the
bytes, in struct fuse_write_in (<linux/fuse.h>). The first write compares the two handles. If they differ, libfuse has
another layout, and all writes are left to pyfuse3.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _ctypes import CFuncPtr

log = logging.getLogger(__name__)

# Request, inode, bytes, size, position, file. PYFUNCTYPE keeps the interpreter's lock during a call, as pyfuse3 does.
HANDLER = ctypes.PYFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
)
_HANDLE_IN_FILE = 16  # in struct fuse_file_info: after the flags, in 64 bits
_HANDLE_BEFORE_BYTES = 40  # the size of struct fuse_write_in, whose first member it is
_READ_ONLY = 0x100  # PyBUF_READ

WriteNow = Callable[[int, int, memoryview], bool]  # handle, position, bytes


def write_handler(library: ctypes.PyDLL, pyfuse3s: int, write_now: WriteNow) -> CFuncPtr:
    """The handler, which must be kept as long as libfuse has it.

    Args:
        library: libfuse's functions.
        pyfuse3s: the address of pyfuse3's handler.
        write_now: writes at once, and returns True; or returns False, or raises anything, to have pyfuse3's handler
            called. It must not keep the bytes.
    """
    ordinary = HANDLER(pyfuse3s)
    reply_write = library.fuse_reply_write
    reply_write.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    view_of = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
        ("PyMemoryView_FromMemory", ctypes.pythonapi)
    )
    handle_at = ctypes.c_uint64.from_address
    layout_known: bool | None = None  # until the first write

    def write(request: int, inode: int, data: int, size: int, pos: int, file: int) -> None:
        nonlocal layout_known
        try:
            handle = handle_at(file + _HANDLE_IN_FILE).value
            if layout_known is None:
                layout_known = handle == handle_at(data - _HANDLE_BEFORE_BYTES).value
                if not layout_known:
                    log.warning("writes are copied once more than necessary: this libfuse has another fuse_file_info")
            if layout_known:
                with view_of(data, size, _READ_ONLY) as view:
                    done = write_now(handle, pos, view)
                if done:
                    reply_write(request, size)
                    return
        except Exception:
            log.debug("a write is tried again", exc_info=True)
        ordinary(request, inode, data, size, pos, file)

    return HANDLER(write)
