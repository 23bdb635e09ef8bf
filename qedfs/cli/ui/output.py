"""The output of commands: JSON for programs, lines and tables for people. Results go to stdout, remarks to stderr.

Owns the choice of the stream, when it is flushed, and the width of a line. Must not know what is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from qedfs.cli.ui.layout import printable

if TYPE_CHECKING:
    from rich.console import Console

# For tables in files and pipes; rich's own default there.
PIPE_WIDTH = 80


def echo(text: str, *, error: bool = False) -> None:
    """Print a line to stdout, or to stderr, and flush it."""
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def print_json(value: object) -> None:
    """Print one JSON document."""
    echo(json.dumps(value, indent=2))


class JsonList:
    """A JSON array that is printed incrementally, one element per line, as qemu-img does."""

    def __init__(self) -> None:
        self._before = "["

    def add(self, value: object) -> None:
        """Print one element. The output may stay buffered until `close`."""
        sys.stdout.write(self._before + json.dumps(value))
        self._before = ",\n"

    def close(self) -> None:
        """Print the end of the array."""
        echo("[]" if self._before == "[" else "]")


def print_json_line(value: object) -> None:
    """Print one JSON document on one line and flush it, for streams of documents."""
    echo(json.dumps(value))


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or 80 columns."""
    # Imported here because it takes as long as all else that most commands import, and they print lines only.
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=False)
    if not found.is_terminal:
        found.width = PIPE_WIDTH
    return found


def terminal_width() -> int | None:
    """The width of the terminal if stdout is one; otherwise None. The user may set COLUMNS, as for `console`."""
    if not sys.stdout.isatty():
        return None
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        return int(named)
    return os.get_terminal_size(sys.stdout.fileno()).columns or PIPE_WIDTH


def remark(text: str) -> None:
    """Print a line for people to stderr. A failure to print it is ignored, since it is not the result."""
    with contextlib.suppress(OSError):
        echo(f"qedfs: {printable(text)}", error=True)


def print_fields(fields: dict[str, Any]) -> None:
    """Print `name: value` lines with the values in one column. Fields that are None are left out."""
    shown = {name: value for name, value in fields.items() if value is not None}
    width = max(map(len, shown), default=0) + 2
    for name, value in shown.items():
        echo(f"{name + ':':<{width}}{printable(str(value))}")
