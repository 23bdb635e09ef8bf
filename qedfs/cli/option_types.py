"""Types of command-line options: sizes with K M G T (1024), durations with s m h, mountpoints.

Owns the message about a value that cannot be read, and limits that hold for every option of a type. Must not know which
option has the type, nor how a text is parsed (`units.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from qedfs.errors import UsageError
from qedfs.image.source_errors import EIO, MOST_BOUND_SECONDS, OnSourceError
from qedfs.units import parse_seconds, parse_size

LEAST_RATE = 1024  # bytes per second

Text = TypeVar("Text", bound=str | bytes | os.PathLike[str])

if TYPE_CHECKING:
    # Generic in click 8.2's types only. At run time this must also work with click 8.1 (Debian 13).
    IntParam = click.ParamType[int]
    FloatParam = click.ParamType[float]
    TextParam = click.ParamType[str]
else:
    IntParam = FloatParam = TextParam = click.ParamType


class Size(IntParam):
    """Bytes, written like 64K, 20M, 1.5G."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except UsageError as exc:
            self.fail(str(exc), param, ctx)


class Rate(Size):
    """Bytes per second, written like a size; 0 is no limit.

    A rate below LEAST_RATE is refused: whoever writes 20 means 20M, as other programs count in KiB or MiB. At 20 bytes
    per second a cluster of 64 KiB takes an hour.
    """

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        rate = super().convert(value, param, ctx)
        if 0 < rate < LEAST_RATE:
            units = f"write {value}M for MiB, {value}K for KiB"
            advice = "the least is 1K" if str(value)[-1:].isalpha() else units
            self.fail(f"{value} is {rate} bytes per second; {advice}", param, ctx)
        return rate


class Duration(FloatParam):
    """Seconds, written like 30, 30s, 10m, 2h."""

    name = "TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        try:
            return parse_seconds(str(value))
        except UsageError as exc:
            self.fail(str(exc), param, ctx)


class Checked(TextParam):
    """A text that `parse` must accept; `parse` raises UsageError. The value stays the text."""

    name = "TEXT"

    def __init__(self, parse: Callable[[str], object]) -> None:
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The same text."""
        try:
            self._parse(str(value))
        except UsageError as exc:
            self.fail(str(exc), param, ctx)
        return str(value)


class Place(click.Path):
    """A mountpoint, or a file that the command opens itself.

    click's own type would call stat on it, which hangs if the server of a mount hangs, and would call a file that may
    not be read a mistake in the command line.
    """

    def convert(self, value: Text, param: click.Parameter | None, ctx: click.Context | None) -> Text:
        """The same text."""
        return value


def parse_source_errors(text: str) -> OnSourceError:
    """What reads do while the source is away: "eio", "wait", or "wait:10m". Raises UsageError."""
    action, colon, bound = text.partition(":")
    if action == "wait" and colon:
        seconds = parse_seconds(bound)
        if not 1 <= seconds <= MOST_BOUND_SECONDS:
            raise UsageError(f"{text!r}: the time is between 1s and {MOST_BOUND_SECONDS}s")
        return OnSourceError(wait=True, bound_seconds=int(seconds))
    if text == "wait":
        return OnSourceError(wait=True)
    if text == "eio":
        return EIO
    raise UsageError(f"{text!r}: write eio, wait, or a longest wait like wait:10m")


def source_error_words(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What the shell offers where `parse_source_errors` reads a text."""
    del ctx, param
    return [word for word in ("eio", "wait") if word.startswith(incomplete)]


SIZE = Size()
RATE = Rate()
DURATION = Duration()
PLACE = Place()
