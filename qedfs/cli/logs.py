"""Where the log of a mount goes: stderr, as lines for people or as JSON, or above the progress bars."""

from __future__ import annotations

import json
import logging
import sys

from rich.console import Console

from qedfs.cli.ui.layout import printable

CONTINUED = "\n  "  # between the lines of one record
_TIMED = "%(asctime)s %(levelname)s %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (seconds since 1970), level, logger, message, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
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
    """A record as a line, and perhaps indented ones below it. No name in it can look like a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The lines, without a traceback."""
        return CONTINUED.join(map(printable, super().formatMessage(record).split(CONTINUED)))


class AboveBars(logging.Handler):
    """Prints through the console that draws the bars, which makes room for the line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        # The terminal wraps it, so that a path or URL can be copied as a whole.
        self._console.print(self.format(record), soft_wrap=True)


def set_up(*, verbose: bool = False, as_json: bool = False, bars: Console | None = None) -> None:
    """Send the log where it belongs, from INFO on, or from DEBUG on if `verbose`."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if bars is None else AboveBars(bars)
    if as_json:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(LineFormatter("qedfs: %(message)s" if bars is not None else _TIMED))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
