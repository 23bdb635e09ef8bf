"""The errno and the log line of a request that has failed.

Owns the choice of the errno, and how often the same error is logged. Must not know requests or images.
"""

from __future__ import annotations

import errno
import logging

import trio
from pyfuse3 import FUSEError

from qedfs.errors import QedfsError, SourceError, UsageError

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0  # between two log lines with the same error of one image
MOST_REMEMBERED = 1000  # error messages that were logged lately


class FailureReplies:
    """Exceptions as replies to the kernel. Each error is logged at most once in LOG_SECONDS per image."""

    def __init__(self) -> None:
        self._logged: dict[tuple[str, str], float] = {}

    def reply(self, exc: Exception, name: str) -> FUSEError:
        """The reply for an exception that a request for the image `name` has raised."""
        if isinstance(exc, FUSEError):
            return exc
        if isinstance(exc, QedfsError):
            self._log_once(name, str(exc), logging.WARNING if isinstance(exc, SourceError) else logging.ERROR)
            # The overlay names an impossible backing. That is not the reader's mistake, as EINVAL would say.
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
