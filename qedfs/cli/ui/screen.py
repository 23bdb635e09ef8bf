"""Lines at the bottom of a terminal, drawn anew when they have changed; what is logged scrolls by above them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from qedfs.cli.ui.bars import ASCII_SIGNS, SIGNS, Signs


class Screen:
    """Use it as a context manager. Nothing is sent to the terminal while nothing changes."""

    def __init__(self, console: Console, *, transient: bool) -> None:
        """`transient`: the lines are taken away at the end."""
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=transient)
        self._shown: tuple[list[Text], int] | None = None

    @property
    def width(self) -> int:
        """Cells of a line."""
        return self._console.width

    @property
    def height(self) -> int:
        """Lines that there is room for: the terminal's but one, so that what was there before can be guessed at."""
        return max(1, self._console.height - 1)

    @property
    def signs(self) -> Signs:
        """What bars can be drawn with."""
        return SIGNS if "utf" in self._console.encoding else ASCII_SIGNS

    def show(self, lines: Sequence[Text]) -> None:
        """Draw these lines instead of the ones before."""
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
    """Let Ctrl-C wait until what is drawn is drawn: of half a screen nobody knows how many lines to take away."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
