"""The exceptions of qedfs, each with the errno that a reader gets and the exit code of a command.

Owns the classes and their codes. Must not know how an error is shown: `cli/exit_status.py` prints it,
`mount/fuse_errors.py` answers the kernel. Imports nothing of the project. Every error that a user can meet is a
`QedfsError`. Exceptions of libraries are translated where they arise, with `from`. The message is one line that names
what failed and, if possible, the remedy. It never contains a credential: sources name themselves by their redacted URL.

Exit codes (see contrib/docs): 1 other, 2 usage (of the command line, and nothing else), 3 bad overlay, 4 source
unreachable, 5 source changed, 6 no space, 7 timed out, 8 in use, 9 refused by policy, 10 no mount there.
"""

from __future__ import annotations

import enum
import errno as _errno
from typing import ClassVar, Self


class QedfsError(Exception):
    """Base of all errors that a user can meet."""

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def fresh(self) -> Self:
        """The same error as a new object, without traceback and cause.

        Code that stores an error must not raise the stored object, only copies of it. A traceback grows each time its
        exception is raised. It keeps alive the frames, and with them the buffers, of every request that the exception
        ended.
        """
        import copy  # here, because few commands need it, and its import looks for a module of Jython

        return copy.copy(self)


class UsageError(QedfsError):
    """The user asked for something impossible: a bad option, the name of a file that is not there. Exit code 2.

    A caller that gets it should look at its own command line, or at a file that it names there. What the machine or
    its state prevents is another error.
    """

    errno: ClassVar[int] = _errno.EINVAL
    exit_code: ClassVar[int] = 2


class Inaccessible(QedfsError):
    """The machine does not let us use a file, a folder or a socket: permission, a read-only or broken file system."""


# What open(2) and others say of a name that leads nowhere.
_NOT_THERE = frozenset({_errno.ENOENT, _errno.ENOTDIR, _errno.ENAMETOOLONG})


def file_error(message: str, exc: OSError) -> QedfsError:
    """The error for a file that the user has named: UsageError if it is not there, Inaccessible for any other reason.

    Raise it `from exc`.
    """
    return UsageError(message) if exc.errno in _NOT_THERE else Inaccessible(message)


class BadOverlay(QedfsError):
    """The overlay file is not, or is no longer, a QED image that can be served. Nothing is written to it."""

    exit_code: ClassVar[int] = 3


class ReadOnlyOverlay(QedfsError):
    """A write to an overlay that is read-only: it was opened read-only, or a barrier on it has failed."""

    errno: ClassVar[int] = _errno.EROFS
    exit_code: ClassVar[int] = 1


class InStandby(QedfsError):
    """The image is in standby: it takes no writes, and keeps nothing of its source, until it is activated."""

    errno: ClassVar[int] = _errno.EROFS


class SourceError(QedfsError):
    """The source gave an unusable answer that a retry will not change (404, bad range)."""

    exit_code: ClassVar[int] = 4


class Reason(enum.StrEnum):
    """Why a request to a source failed: a closed set, small enough for the label of a metric."""

    CONNECT = "connect"  # no connection could be made: name resolution, network, refusal, TLS, proxy
    TIMEOUT = "timeout"  # no answer, or too slow an answer
    CUT = "cut"  # the connection ended before the answer did
    SERVER = "server"  # the server said that it cannot serve the request now: HTTP 5xx and 429, an NBD error
    ANSWER = "answer"  # the answer did not match the request: another range or length, or garbled
    OTHER = "other"  # a fault of this machine


class SourceUnreachable(SourceError):
    """The source gave no usable answer, but a retry may succeed: refused, reset, timed out, 503, cut short.

    `retry_after_seconds` is the delay that the server asked for (HTTP Retry-After), None if it did not.
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
    """The overlay cannot grow: its file system is full (ENOSPC, EDQUOT) or limits the file size (EFBIG)."""

    errno: ClassVar[int] = _errno.ENOSPC
    exit_code: ClassVar[int] = 6


class NoMemory(QedfsError):
    """The request needs more memory than all images of the mount together may use."""

    errno: ClassVar[int] = _errno.ENOMEM


class TimedOut(QedfsError):
    """A wait exceeded the timeout that the user set."""

    errno: ClassVar[int] = _errno.ETIMEDOUT
    exit_code: ClassVar[int] = 7


class InUse(QedfsError):
    """The overlay is open elsewhere (qedfs or QEMU), or the mountpoint is busy.

    `overlay`: the path of the overlay that another program has locked, None if that is not the reason. Whoever shows
    the error can find out which program it is.
    """

    errno: ClassVar[int] = _errno.EBUSY
    exit_code: ClassVar[int] = 8

    def __init__(self, message: str = "", *, overlay: str | None = None) -> None:
        super().__init__(message)
        self.overlay = overlay


class NotMounted(QedfsError):
    """No qedfs mount answers at this folder: it has not started yet, or has ended."""

    errno: ClassVar[int] = _errno.ENOTCONN
    exit_code: ClassVar[int] = 10


class Refused(QedfsError):
    """The policy of the mounting user does not allow this backing. The message names the option that allows it."""

    errno: ClassVar[int] = _errno.EACCES
    exit_code: ClassVar[int] = 9
