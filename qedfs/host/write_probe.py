"""Asks the kernel whether a write to a file would have to wait before it begins, without waiting.

While a file system is frozen (fsfreeze(8), FIFREEZE, a snapshot of LVM), the kernel lets every write sleep until the
thaw, before it looks at any flag: RWF_NOWAIT of pwritev2(2) does not help, and no signal ends that sleep. io_uring(7)
is the only interface that tries the lock of the freeze instead of taking it (io_uring/rw.c: io_kiocb_start_write). So
the probe is a write of no bytes through io_uring, with RWF_NOWAIT. It changes nothing, neither length nor times. Its
descriptor has O_DIRECT, as ext4 refuses buffered writes that may not wait. The file system also reports that another
write has locked the file.

A probe costs 1.3 us of processor time. Between it and the write that follows is about 1 us, in which a freeze may still
begin. If the kernel has no io_uring, or does not allow it (a container, kernel.io_uring_disabled), probes know nothing.
Owns the one io_uring of the process. Must not know what a caller does with the answer (`overlay/loop_writes.py`).
Imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct

# File systems that answer such a write at once (fs/*/file.c). Of others, a refusal would say nothing.
PROBED_TYPES = frozenset({"ext4", "xfs", "btrfs"})

# Numbers of system calls, the same on all architectures but Alpha.
_SETUP, _ENTER = 425, 426
# <linux/io_uring.h>
_PARAMS_SIZE, _ENTRY_SIZE, _COMPLETION_SIZE = 120, 64, 16
_SUBMISSIONS_AT, _ENTRIES_AT = 0, 0x10000000
_WRITE = 23
_ENTRY = "<BBHi QQ II"
_RWF_NOWAIT = 8
_UINT_MAX = (1 << 32) - 1


class _Ring:
    """An io_uring with one entry: a write of no bytes, of which only the descriptor ever changes."""

    def __init__(self) -> None:
        """Raises OSError if the kernel refuses."""
        import ctypes  # here, because loading it takes 4 ms

        # PyDLL keeps the interpreter's lock during the call, which does not wait.
        self._call = ctypes.PyDLL(None, use_errno=True).syscall
        params = ctypes.create_string_buffer(_PARAMS_SIZE)
        fd = self._call(ctypes.c_long(_SETUP), ctypes.c_long(1), params)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        try:
            self._map(fd, params.raw)
        except BaseException:
            os.close(fd)
            raise
        self._enter = (_ENTER, fd, 1, 0, 0)  # one entry; the other two arguments would count only if we waited

    def _map(self, fd: int, params: bytes) -> None:
        entries, completions = struct.unpack_from("<2I", params)
        _, tail, _, _, _, _, array = struct.unpack_from("<7I", params, 40)
        head, _, mask, _, _, found = struct.unpack_from("<6I", params, 80)
        size = max(array + 4 * entries, found + _COMPLETION_SIZE * completions)
        ring = mmap.mmap(fd, size, offset=_SUBMISSIONS_AT)
        entry = mmap.mmap(fd, _ENTRY_SIZE * entries, offset=_ENTRIES_AT)
        struct.pack_into(_ENTRY, entry, 0, _WRITE, 0, 0, -1, 0, 0, 0, _RWF_NOWAIT)
        self._words, self._results = memoryview(ring).cast("I"), memoryview(ring).cast("i")
        self._descriptor = memoryview(entry).cast("i")
        self._tail, self._head, self._found = tail // 4, head // 4, found // 4 + 2
        self._mask = self._words[mask // 4]

    def write_nothing(self, fd: int) -> int:
        """The result of a write of no bytes: 0, or a negative errno."""
        words = self._words
        number = words[self._head]
        self._descriptor[1] = fd
        words[self._tail] = after = number + 1 & _UINT_MAX
        self._call(*self._enter)
        words[self._head] = after
        result: int = self._results[self._found + 4 * (number & self._mask)]
        return result


_rings: list[_Ring | None] = []  # the ring of this process, once it was needed; None if the kernel refuses


def _ring() -> _Ring | None:
    if not _rings:
        try:
            _rings.append(_Ring())
        except (OSError, ValueError):
            _rings.append(None)
    return _rings[0]


class WriteProbe:
    """The probe of one open file. For one thread."""

    def __init__(self, fd: int, filesystem_type: str) -> None:
        """`fd`: open for writing. The probe has a descriptor of its own, unless it can tell nothing."""
        self._fd = -1
        self._ring: _Ring | None = None
        if filesystem_type in PROBED_TYPES and (ring := _ring()) is not None:
            with contextlib.suppress(OSError):
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
                self._ring = ring

    @property
    def blind(self) -> bool:
        """Whether it can tell nothing."""
        return self._ring is None

    def would_wait(self) -> bool:
        """Whether a write to the file would have to wait now. False if nothing can tell."""
        return self._ring is not None and self._ring.write_nothing(self._fd) == -errno.EAGAIN

    def close(self) -> None:
        """Close the descriptor. After this, the probe knows nothing."""
        self._ring = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
