"""What the kernel is told of a request that failed, an errno, and what the log is. Must not know requests or images."""

from __future__ import annotations

import errno
import logging

import trio
from pyfuse3 import FUSEError

from qedfs.errors import QedfsError, SourceError, UsageError

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # between two lines on the same trouble of one image
MOST_REMEMBERED = 1000  # troubles that the log has had lately


class FailureReplies:
    """Exceptions as replies to the kernel. The log has one line in a while for one trouble, however often it is met."""

    def __init__(self) -> None:
        self._logged: dict[tuple[str, str], float] = {}

    def reply(self, exc: Exception, name: str) -> FUSEError:
        """The reply for an exception that was met on behalf of the image `name`."""
        if isinstance(exc, FUSEError):
            return exc
        if isinstance(exc, QedfsError):
            self._log_once(name, str(exc), logging.WARNING if isinstance(exc, SourceError) else logging.ERROR)
            # The overlay names something impossible: its maker's mistake. EINVAL would blame the reader.
            return FUSEError(errno.EIO if isinstance(exc, UsageError) else exc.errno)
        if isinstance(exc, OSError) and exc.errno:
            self._log_once(name, str(exc), logging.ERROR)
            return FUSEError(exc.errno)
        log.error("%s: internal error", name, exc_info=exc)
        return FUSEError(errno.EIO)

    def _log_once(self, name: str, text: str, level: int) -> None:
        now = trio.current_time()
        if now - self._logged.get((name, text), float("-inf")) < LOG_SECONDS:
            return
        if len(self._logged) > MOST_REMEMBERED:
            self._logged.clear()
        self._logged[name, text] = now
        log.log(level, "%s: %s", name, text)
