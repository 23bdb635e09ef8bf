"""The FUSE_INIT exchange with the kernel, in which the server says how many requests may be in flight.

Owns two numbers in libfuse's answer that pyfuse3 cannot set. Must not know what is served.

The kernel counts read-ahead and every O_DIRECT request, asynchronous or not, as "background". It keeps at most
`max_background` of them in flight for the whole mount: 12, unless the server asks for more. Further requests wait in
the kernel, whichever image they are for. With that default, 12 readers of one image whose source is dead would block
every other image.

fusectl exposes the same number, but is often not mounted, especially in containers. So during this one exchange a pipe
stands between the kernel and libfuse, and the answer is edited on its way. The edited bytes are the kernel's interface
(fuse(4), <linux/fuse.h>), not libfuse's.

The kernel sends FUSE_INIT once. A server that takes a mount over gives its libfuse the same bytes through the same
pipe, and keeps the answer from the kernel, which has had it. Then it asks the kernel to send again what the other
server had read and not answered (FUSE_NOTIFY_RESEND, Linux 6.9).
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

# Background requests in flight per mount. The kernel allows at most 65535, and a user without CAP_SYS_ADMIN at most
# /sys/module/fuse/parameters/max_user_bgreq, which is one per 3 MiB of memory by default.
MAX_BACKGROUND = 4096
MESSAGE_BYTES = (1 << 20) + 4096  # libfuse's own read size; the kernel refuses a smaller buffer

_OWN_LIMIT = Path("/sys/module/fuse/parameters/max_user_bgreq")
_OWN_IDS = Path("/proc/self/uid_map")

_REQUEST = struct.Struct("=II")  # of fuse_in_header: length, opcode
_INIT = 26
_HEADER = struct.Struct("=IiQ")  # fuse_out_header: length, error, the request that is answered
# After the header in fuse_init_out: major, minor, max_readahead, flags; then max_background, congestion_threshold.
_LIMITS = struct.Struct("=HH")
_LIMITS_AT = _HEADER.size + 16
# In fuse_init_in: after the header of 40 bytes major, minor, max_readahead, flags, flags2.
_FLAGS2 = struct.Struct("=I")
_FLAGS2_AT = 40 + 16
_HAS_RESEND = 1 << (39 - 32)
_RESEND = _HEADER.pack(_HEADER.size, 7, 0)  # a notification: no request is answered, and the error is its kind


def background_limit() -> int:
    """How many background requests the kernel will allow for our mount."""
    try:
        if os.geteuid() == 0 and _OWN_IDS.read_bytes().split() == [b"0", b"0", b"4294967295"]:
            return MAX_BACKGROUND  # root of the initial user namespace, the only one whose CAP_SYS_ADMIN counts
        return min(MAX_BACKGROUND, int(_OWN_LIMIT.read_bytes()))
    except (OSError, ValueError):
        return MAX_BACKGROUND  # every kernel has the parameter, but a sandbox may hide it


class Handshake:
    """One exchange, from the kernel's request to libfuse's answer. `fd` is /dev/fuse with its first request pending.

    That request need not be FUSE_INIT: a libfuse may already have done the exchange while it mounted
    (FUSE_DEV_IOC_SYNC_INIT, Linux 6.18). Then request and answer pass through unchanged.
    """

    def __init__(self, fd: int, replay: bytes = b"") -> None:
        """Read the kernel's request and make `fd` refer to a pipe. OSError: the mount is gone, `fd` is unchanged.

        `replay`: the request that the kernel has sent to an earlier server, for a libfuse that takes the mount over.
        """
        self._fd = fd
        self._replayed = bool(replay)
        self._kernel = os.dup(fd)
        self._pipe, end = os.pipe()
        try:
            # Linux can open a pipe for both directions: libfuse reads the request from it and writes the answer to it.
            both = os.open(f"/proc/self/fd/{end}", os.O_RDWR | os.O_CLOEXEC)
            os.close(end)
            end = both
            self.request = replay or os.read(self._kernel, MESSAGE_BYTES)
            self._changed = with_limits if is_init(self.request) else bytes
            os.write(both, self.request)
            os.dup2(both, fd, inheritable=False)
        except BaseException:
            self._close()
            raise
        finally:
            os.close(end)

    def finish(self) -> None:
        """Pass libfuse's answer on, and make `fd` refer to the kernel again."""
        os.dup2(self._kernel, self._fd, inheritable=False)
        try:
            # If libfuse gave no answer, this reads the end of the pipe. On OSError the mount is gone, and the next read
            # of `fd` will report that.
            with contextlib.suppress(OSError):
                answer = os.read(self._pipe, MESSAGE_BYTES)
                if not self._replayed:
                    os.write(self._kernel, self._changed(answer))
                elif can_resend(self.request):
                    os.write(self._kernel, _RESEND)
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self._kernel)
        os.close(self._pipe)


def is_init(request: bytes) -> bool:
    """Whether a request is FUSE_INIT."""
    return len(request) >= _REQUEST.size and _REQUEST.unpack_from(request)[1] == _INIT


def can_resend(request: bytes) -> bool:
    """Whether the kernel that has sent this FUSE_INIT can send again what a dead server has not answered."""
    if not is_init(request) or len(request) < _FLAGS2_AT + _FLAGS2.size:
        return False
    return bool(_FLAGS2.unpack_from(request, _FLAGS2_AT)[0] & _HAS_RESEND)


def with_limits(answer: bytes) -> bytes:
    """The answer to FUSE_INIT with our limits. An error, or an answer too old to have limits, is returned unchanged."""
    if len(answer) < _LIMITS_AT + _LIMITS.size or _HEADER.unpack_from(answer)[1]:
        return answer
    changed = bytearray(answer)
    _LIMITS.pack_into(changed, _LIMITS_AT, MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4)
    return bytes(changed)
