"""The log of a mount, as text or as JSON, on stderr. While progress bars are drawn, log lines appear above them."""

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
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if bars is None else AboveBars(bars)
    if as_json:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(LineFormatter("qedfs: %(message)s" if bars is not None else _TIMED))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
