"""How commands print: JSON for programs, lines and tables for people. Results go to stdout, remarks to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click
from rich.console import Console

from qedfs.cli.ui.layout import printable

# People read tables in files and pipes too; rich would take 80 columns there anyway.
PIPE_WIDTH = 80


def print_json(value: object) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=2))


class JsonList:
    """A JSON array that is printed while it comes into being, one element per line, as qemu-img prints long ones."""

    def __init__(self) -> None:
        self._before = "["

    def add(self, value: object) -> None:
        """Print one element. What is printed may wait in a buffer until `close`."""
        sys.stdout.write(self._before + json.dumps(value))
        self._before = ",\n"

    def close(self) -> None:
        """Print the end."""
        click.echo("[]" if self._before == "[" else "]")


def print_json_line(value: object) -> None:
    """One JSON document on one line, at once: for streams of them."""
    click.echo(json.dumps(value))


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or 80 columns."""
    found = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=False)
    if not found.is_terminal:
        found.width = PIPE_WIDTH
    return found


def remark(text: str) -> None:
    """A line for people that is not the result. Where it cannot be written nobody reads it, and nothing has failed."""
    with contextlib.suppress(OSError):
        click.echo(f"qedfs: {printable(text)}", err=True)


def print_fields(fields: dict[str, Any]) -> None:
    """`name: value` lines, the values in one column; a None is left out."""
    shown = {name: value for name, value in fields.items() if value is not None}
    width = max(map(len, shown), default=0) + 2
    for name, value in shown.items():
        click.echo(f"{name + ':':<{width}}{printable(str(value))}")
