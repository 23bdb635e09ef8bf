"""The errors of qedfs: what went wrong, who must act, which errno and which exit code it becomes.

Imports nothing of the project. Every error that a user can meet is a `QedfsError`; foreign exceptions are
translated where they arise, with `from`. The message is one line that names the thing and, where there is one,
the way out; it never holds a credential (sources name themselves by their redacted URL).

Exit codes (documented in README): 1 other, 2 usage, 3 bad overlay, 4 source unreachable, 5 source changed,
6 no space, 7 timed out, 8 in use, 9 refused by policy, 10 no mount there.
"""

from __future__ import annotations

import copy
import enum
import errno as _errno
from typing import ClassVar, Self


class QedfsError(Exception):
    """Base of all errors that a user can meet."""

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def fresh(self) -> Self:
        """The same error as a new object, without traceback and cause.

        Whoever keeps an error keeps one object and raises others. A traceback grows each time that its exception is
        raised, and holds the frames, and so the buffers, of every request that the exception has ended.
        """
        return copy.copy(self)


class UsageError(QedfsError):
    """The user asked for something that cannot be: a bad option, a missing file. Exit code 2."""

    errno: ClassVar[int] = _errno.EINVAL
    exit_code: ClassVar[int] = 2


class BadOverlay(QedfsError):
    """The overlay file is not a QED image that can be served, or no longer. Nothing is written to it."""

    exit_code: ClassVar[int] = 3


class ReadOnlyOverlay(QedfsError):
    """A write to an overlay that takes none: opened read-only, or a barrier failed on it."""

    errno: ClassVar[int] = _errno.EROFS
    exit_code: ClassVar[int] = 1


class SourceError(QedfsError):
    """The source gave an answer that cannot be used and that asking again will not change (404, bad range)."""

    exit_code: ClassVar[int] = 4


class Reason(enum.StrEnum):
    """What stood in the way of a source's answer: a closed set, small enough for the label of a metric."""

    CONNECT = "connect"  # there was no connection: the name, the network, a refusal, TLS, a proxy
    TIMEOUT = "timeout"  # no answer, or too slow a one
    CUT = "cut"  # the connection ended before the answer did
    SERVER = "server"  # the server said that it cannot do it now: HTTP 5xx and 429, an NBD error
    ANSWER = "answer"  # it was not what had been asked for: another range or length, or garbled
    OTHER = "other"  # on this machine


class SourceUnreachable(SourceError):
    """The source gave no usable answer now, another try may succeed: refused, reset, timed out, 503, cut short.

    `retry_after_seconds` is the server's own wish (HTTP Retry-After), when it gave one.
    """

    def __init__(
        self, message: str, *, reason: Reason = Reason.OTHER, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class SourceChanged(SourceError):
    """The source is no longer the version whose clusters the overlay holds."""

    exit_code: ClassVar[int] = 5


class NoSpace(QedfsError):
    """The overlay cannot grow: its file system is full (ENOSPC, EDQUOT) or takes no larger file (EFBIG)."""

    errno: ClassVar[int] = _errno.ENOSPC
    exit_code: ClassVar[int] = 6


class NoMemory(QedfsError):
    """What this needs does not fit into the memory that all images of the mount may take together."""

    errno: ClassVar[int] = _errno.ENOMEM


class TimedOut(QedfsError):
    """A wait that the user bounded ran out."""

    errno: ClassVar[int] = _errno.ETIMEDOUT
    exit_code: ClassVar[int] = 7


class InUse(QedfsError):
    """The overlay is open elsewhere (qedfs or QEMU), or the mountpoint is busy."""

    errno: ClassVar[int] = _errno.EBUSY
    exit_code: ClassVar[int] = 8


class NotMounted(QedfsError):
    """No mount of qedfs answers at a folder that could hold one: not yet, or no longer."""

    errno: ClassVar[int] = _errno.ENOTCONN
    exit_code: ClassVar[int] = 10


class Refused(QedfsError):
    """The policy of the mounting user does not allow this backing. The message names the option that would."""

    errno: ClassVar[int] = _errno.EACCES
    exit_code: ClassVar[int] = 9
