"""A command on a pseudo-terminal: what it sends, and what a person would see.

`Grid` understands what our own screens are drawn with and refuses everything else, so that a test which passes has
seen all that a terminal would have been sent.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

from .hang import HANG_SECONDS
from .starter import Forked

_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", re.DOTALL)
_CUT = re.compile(r"\x1b(\[[?\d;]*)?$")


class Grid:
    """The rows of a terminal, and those that have scrolled out of it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns = columns
        self.lines = lines
        self.scrolled: list[str] = []
        self._cells = [[" "] * columns for _ in range(lines)]
        self._row = self._column = 0
        self._rest = ""  # of a sequence whose end is still to come

    @property
    def rows(self) -> list[str]:
        """The visible rows, without trailing blanks."""
        return ["".join(cells).rstrip() for cells in self._cells]

    @property
    def text(self) -> str:
        """All rows, including those that have scrolled out."""
        return "\n".join([*self.scrolled, *self.rows]).rstrip()

    def feed(self, text: str) -> None:
        """Take what a program has sent. A sequence that is none of ours raises ValueError."""
        text = self._rest + text
        cut = _CUT.search(text)
        self._rest = "" if cut is None else cut[0]
        for found in _TOKEN.finditer(text.removesuffix(self._rest)):
            parameters, command, character = found.groups()
            if command is not None:
                self._command(parameters, command)
            elif character == "\r":
                self._column = 0
            elif character == "\n":
                self._new_line()
            elif character.isprintable():
                self._put(character)
            else:
                raise ValueError(f"a terminal was sent {character!r}")

    def _command(self, parameters: str, command: str) -> None:
        if command == "A":
            self._row = max(0, self._row - int(parameters or 1))
        elif (parameters, command) == ("2", "K"):
            self._cells[self._row] = [" "] * self.columns
        elif command != "m" and (parameters, command) not in (("?25", "l"), ("?25", "h")):
            raise ValueError(f"a terminal was sent CSI {parameters}{command}")

    def _new_line(self) -> None:
        if self._row + 1 < self.lines:
            self._row += 1
            return
        self.scrolled.append("".join(self._cells.pop(0)).rstrip())
        self._cells.append([" "] * self.columns)

    def _put(self, character: str) -> None:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self._column + width > self.columns:
            self._column = 0
            self._new_line()
        self._cells[self._row][self._column : self._column + width] = [character, *[""] * (width - 1)]
        self._column += width


class Terminal:
    """`qedfs WORDS...` on a terminal of its own, which is interrupted when the block ends."""

    def __init__(self, *words: str | Path, columns: int = 80, lines: int = 24) -> None:
        self.grid = Grid(columns, lines)
        self.sent = 0  # bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environ = {**os.environ, "TERM": "xterm"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environ.pop(name, None)
        self._child = Forked([os.fspath(word) for word in words], follower, follower, follower, environ=environ)
        os.close(follower)

    def wait_for(self, seen: Callable[[Grid], bool], what: str) -> None:
        """Read until `seen` is true of the grid.

        Raises:
            TimeoutError: it did not become true, or the command ended before.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while not seen(self.grid):
            if not self._read(deadline - time.monotonic()):
                raise TimeoutError(f"no {what} on the terminal:\n{self.grid.text}")

    def watch(self, seconds: float) -> float:
        """Read for this long, or longer on a busy machine; returns how many bytes a second were sent meanwhile."""
        while self._read(0):  # what was sent before
            pass
        before, began = self.sent, time.monotonic()
        while self._read(began + seconds - time.monotonic()):
            pass
        return (self.sent - before) / max(seconds, time.monotonic() - began)

    def interrupt(self) -> int:
        """Ctrl-C, if it still runs; then what it says at its end, and its exit code."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, when it ends by itself."""
        while self._read(HANG_SECONDS):
            pass
        return self._child.wait(HANG_SECONDS)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.interrupt()
        os.close(self._leader)

    def _read(self, seconds: float) -> bool:
        """Take what comes next; False: nothing came in time, or the command has hung up."""
        ready, _, _ = select.select([self._leader], [], [], max(0.0, seconds))
        data = b""
        if ready:
            # EIO: the other end is closed.
            with contextlib.suppress(OSError):
                data = os.read(self._leader, 65536)
        self.sent += len(data)
        self.grid.feed(self._decoder.decode(data))
        return bool(data)
