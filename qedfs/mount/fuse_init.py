"""The first exchange with the kernel, FUSE_INIT, in which the server says how much may be in flight.

Owns two numbers of libfuse's answer, which pyfuse3 has no way to set. Must not know what is served.

The kernel counts read-ahead and every O_DIRECT request, asynchronous or not, as "background", and has at most
`max_background` of these in flight for a whole mount: 12, unless the server says otherwise. Who comes next waits in the
kernel, whatever image it is about. So with 12 readers of one image whose source is dead, no other image could be read.

fusectl has the same number, but is not mounted everywhere, least of all in containers. So libfuse gets the kernel's
request, and the kernel libfuse's answer, through a pipe, for the time of this one exchange. What passes there
is the kernel's interface (fuse(4), <linux/fuse.h>), and not libfuse's.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

# In flight at once for a mount. The kernel takes no more than 65535, and from a user without CAP_SYS_ADMIN no more than
# /sys/module/fuse/parameters/max_user_bgreq, by default one for every 3 MiB of memory.
MAX_BACKGROUND = 4096
MESSAGE_BYTES = (1 << 20) + 4096  # what libfuse reads with; the kernel refuses a small buffer

_OWN_LIMIT = Path("/sys/module/fuse/parameters/max_user_bgreq")
_OWN_IDS = Path("/proc/self/uid_map")

_REQUEST = struct.Struct("=II")  # of fuse_in_header: length, opcode
_INIT = 26
_HEADER = struct.Struct("=IiQ")  # fuse_out_header: length, error, the request that is answered
# After the header in fuse_init_out: major, minor, max_readahead, flags; then max_background, congestion_threshold.
_LIMITS = struct.Struct("=HH")
_LIMITS_AT = _HEADER.size + 16


def background_limit() -> int:
    """How many reads the kernel will let be in flight for a mount of ours."""
    try:
        if os.geteuid() == 0 and _OWN_IDS.read_bytes().split() == [b"0", b"0", b"4294967295"]:
            return MAX_BACKGROUND  # in the first user namespace; root of another one lacks the right that counts
        return min(MAX_BACKGROUND, int(_OWN_LIMIT.read_bytes()))
    except (OSError, ValueError):
        return MAX_BACKGROUND  # no kernel without the module's parameter, but perhaps a sandbox that hides it


class Handshake:
    """From the kernel's request to libfuse's answer. `fd` is /dev/fuse, and readable for the first time.

    The first request may be another one: a libfuse can have had this exchange while it mounted
    (FUSE_DEV_IOC_SYNC_INIT, Linux 6.18). Then it passes through, and so does its answer.
    """

    def __init__(self, fd: int) -> None:
        """Take the kernel's request, and let `fd` lead to us. OSError: the mount is gone already; `fd` is untouched."""
        self._fd = fd
        self._kernel = os.dup(fd)
        self._pipe, end = os.pipe()
        try:
            # Opened for both directions, which Linux can do: libfuse reads the request, then we the answer.
            both = os.open(f"/proc/self/fd/{end}", os.O_RDWR | os.O_CLOEXEC)
            os.close(end)
            end = both
            request = os.read(self._kernel, MESSAGE_BYTES)
            self._changed = with_limits if is_init(request) else bytes
            os.write(both, request)
            os.dup2(both, fd, inheritable=False)
        except BaseException:
            self._close()
            raise
        finally:
            os.close(end)

    def finish(self) -> None:
        """Hand libfuse's answer on, and let `fd` lead to the kernel again."""
        os.dup2(self._kernel, self._fd, inheritable=False)
        try:
            # Without an answer this is the end of the pipe. OSError: the mount has ended; who reads `fd` next is told.
            with contextlib.suppress(OSError):
                os.write(self._kernel, self._changed(os.read(self._pipe, MESSAGE_BYTES)))
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self._kernel)
        os.close(self._pipe)


def is_init(request: bytes) -> bool:
    """Whether a request is FUSE_INIT."""
    return len(request) >= _REQUEST.size and _REQUEST.unpack_from(request)[1] == _INIT


def with_limits(answer: bytes) -> bytes:
    """An answer to FUSE_INIT that asks for our limits; one that refuses, or is from before there were any, as it is."""
    if len(answer) < _LIMITS_AT + _LIMITS.size or _HEADER.unpack_from(answer)[1]:
        return answer
    changed = bytearray(answer)
    _LIMITS.pack_into(changed, _LIMITS_AT, MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4)
    return bytes(changed)
