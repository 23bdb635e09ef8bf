"""Lines at the bottom of a terminal, redrawn when they change. Log lines scroll above them.

Owns when the terminal is written to, and that a Ctrl-C leaves it in order. Must not know what the lines say.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from qedfs.cli.ui.bars import ASCII_SIGNS, SIGNS, Signs


class Screen:
    """The lines, as a context manager. Writes to the terminal only when the lines or the width have changed."""

    def __init__(self, console: Console, *, transient: bool) -> None:
        """`transient`: the lines are removed at the end."""
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=transient)
        self._shown: tuple[list[Text], int] | None = None

    @property
    def width(self) -> int:
        """The width of a line in cells."""
        return self._console.width

    @property
    def height(self) -> int:
        """How many lines can be shown: one less than the terminal has, so that the latest log line stays visible."""
        return max(1, self._console.height - 1)

    @property
    def signs(self) -> Signs:
        """The characters to draw bars with: ASCII only, unless the terminal's encoding is UTF-8 or the like."""
        return SIGNS if "utf" in self._console.encoding else ASCII_SIGNS

    def show(self, lines: Sequence[Text]) -> None:
        """Replace the lines."""
        shown = (list(lines), self.width)
        if shown != self._shown:
            self._shown = shown
            with _whole():
                self._live.update(Text("\n", no_wrap=True, overflow="crop").join(lines), refresh=True)

    def __enter__(self) -> Self:
        with _whole():
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _whole():
            self._live.stop()


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Delay Ctrl-C until the block ends. If it interrupted a drawing, the number of lines to erase would be unknown.

    Exchanges the handler: to block the signal would block it in this thread only, and the process has others, on whose
    behalf Python runs the handler here all the same.
    """
    delayed = False

    def note(_: int, __: FrameType | None) -> None:
        nonlocal delayed
        delayed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if delayed:
            signal.raise_signal(signal.SIGINT)
