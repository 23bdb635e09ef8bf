"""The log of a mount, as text or as JSON, on stderr. While progress bars are drawn, log lines appear above them.

Owns the form of a line, the level, and where lines go. Must not know who logs, nor what.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from qedfs.cli.ui.layout import printable

if TYPE_CHECKING:
    from rich.console import Console

CONTINUED = "\n  "  # between the lines of one record
_UNTIMED = "%(levelname)s %(message)s"
_TIMED = f"%(asctime)s {_UNTIMED}"
# Levels of Python -> priorities of syslog(3), from the most urgent down.
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.NOTSET: 7}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (seconds since 1970), level, logger, message, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        fields = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class LineFormatter(logging.Formatter):
    """A record as a line, with indented continuation lines. Escapes control characters, so no name can forge a line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The lines of the record, without a traceback."""
        return CONTINUED.join(map(printable, super().formatMessage(record).split(CONTINUED)))


class JournalFormatter(LineFormatter):
    """A record for systemd's journal, which has the time itself, and takes each line for an entry of its own.

    Each line begins with its priority, as sd-daemon(3) writes it. `journalctl -p warning` goes by that.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The lines of the record and of its traceback, if there is one."""
        priority = next(number for level, number in _PRIORITIES.items() if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class AboveBars(logging.Handler):
    """Prints log lines through the console that draws the bars. It then draws the bars again, below the new line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        # Let the terminal wrap the line, so that a path or URL can be copied whole.
        self._console.print(self.format(record), soft_wrap=True)


def set_up(*, verbose: bool = False, as_json: bool = False, bars: Console | None = None) -> None:
    """Set up logging at level INFO, or DEBUG if `verbose`. `bars`: the console that draws progress bars, or None."""
    handler: logging.Handler = logging.StreamHandler(_own_stderr()) if bars is None else AboveBars(bars)
    if as_json:
        handler.setFormatter(JsonFormatter())
    elif bars is None and is_journal(sys.stderr):
        handler.setFormatter(JournalFormatter(_UNTIMED))
    else:
        handler.setFormatter(LineFormatter("qedfs: %(message)s" if bars is not None else _TIMED))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)


def _own_stderr() -> TextIO:
    """Standard error by a descriptor of its own. What is printed to descriptor 2 while libfuse mounts is caught."""
    try:
        return open(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="backslashreplace")
    except (OSError, ValueError):  # no descriptor is left, or it is not a file
        return sys.stderr


def is_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written there goes to systemd's journal.

    systemd.exec(5): JOURNAL_STREAM has the device and inode number of the stream. It is inherited by programs whose
    output goes elsewhere, so these have to be compared.
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or not a file
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
