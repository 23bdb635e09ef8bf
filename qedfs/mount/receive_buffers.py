"""Buffers into which libfuse receives requests, touched when they are allocated. For mounts that outlive their server.

Owns libfuse's pointer to malloc. Must not know requests.

The kernel copies a request into our memory page by page. If a page was never touched, it has to be allocated in the
middle of the copy, and that fails once SIGKILL is pending: the request ends with EIO instead of waiting for the next
server. In pages that exist, the copy works to its end, dying or not. The OOM killer makes it worse: it kills because
of such allocations. So a buffer (1 MiB for each request in flight) is written to when libfuse allocates it, which it
does for each task that reads requests. Measured under fio: of 15 kills one cost a write; see contrib/RELIABILITY.md.

With a handler write_buf, libfuse may receive through a pipe instead, whose pages the kernel allocates.
`more_operations.py` takes that handler away.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys

from qedfs.errors import QedfsError
from qedfs.mount.libfuse import libfuse
from qedfs.mount.library_memory import Pointer, address_of, made_writable, memory_of

log = logging.getLogger(__name__)

LARGE_BYTES = 64 << 10  # smaller than any buffer for requests; everything else that libfuse allocates is far smaller
_WORD = ctypes.sizeof(ctypes.c_void_p)
_MALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)

_kept: list[object] = []  # what libfuse refers to until the process ends


def touch_receive_buffers() -> bool:
    """From now on, touch the large blocks that libfuse allocates. Returns whether that is possible."""
    try:
        pointer = _pointer_to_malloc()
    except (OSError, LookupError, QedfsError) as exc:
        log.warning("a crash may fail the write that is being received: %s", exc)
        return False
    word = ctypes.c_void_p.from_address(pointer.place)
    real = _MALLOC(word.value or 0)

    def malloc(size: int) -> int | None:
        block: int | None = real(size)
        if block and size >= LARGE_BYTES:
            ctypes.memset(block, 0, size)
        return block

    hook = _MALLOC(malloc)
    _kept.append(hook)
    with made_writable(pointer):
        word.value = ctypes.cast(hook, ctypes.c_void_p).value
    return True


def _pointer_to_malloc() -> Pointer:
    """libfuse's one pointer to malloc. Raises LookupError."""
    path = libfuse()[1]
    wanted = {address.to_bytes(_WORD, sys.byteorder) for address in _mallocs(path)}
    found = []
    for start, end, writable in memory_of(os.path.realpath(path)):
        memory = ctypes.string_at(start, end - start)
        places = [at for at in range(0, len(memory), _WORD) if memory[at : at + _WORD] in wanted]
        found += [Pointer(start + at, writable, "malloc") for at in places]
    if len(found) != 1:
        raise LookupError(f"libfuse has {len(found)} pointers to malloc, not one")
    return found[0]


def _mallocs(path: str) -> set[int]:
    """The addresses that libfuse may have for malloc: the C library's, or that of a library that has replaced it.

    The process as a whole may name a third one. If the interpreter is not a position-independent program, as in Debian,
    that is a place in the interpreter that leads to the C library's.
    """
    return {address_of(ctypes.PyDLL(library), "malloc") for library in (None, path)}
