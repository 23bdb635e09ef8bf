"""The progress bar of a command that copies: how many bytes are done, and a bar of that on a terminal.

Owns the count and the drawing. Must not know what is copied.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

import trio

from qedfs.control.monitoring.progress_rate import Rate

REFRESH_SECONDS = 0.5


class CopyProgress:
    """Counts a copy. Threads may add bytes, one at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.done = 0
        self.total = 0  # set when it is known; nothing is drawn before
        self.passes = 1  # how many times all bytes are copied, as to a file and from there to another

    def add(self, size: int) -> None:
        """Count bytes that have been copied."""
        self.done += size


@contextlib.asynccontextmanager
async def drawn(progress: CopyProgress, *, quiet: bool = False) -> AsyncIterator[None]:
    """Draw a bar on standard error for the length of the block, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_draw, progress)
        yield
        nursery.cancel_scope.cancel()


async def _draw(progress: CopyProgress) -> None:
    # Imported here because loading rich is slow, and most copies have no terminal.
    from qedfs.cli.ui.bars import copy_line
    from qedfs.cli.ui.output import console
    from qedfs.cli.ui.screen import Screen

    rate = Rate()
    with Screen(console(stderr=True), transient=True) as screen:
        while True:
            rate.note(trio.current_time(), progress.done)
            if progress.total:
                total = progress.total * progress.passes
                done = min(progress.done, total)
                screen.show([copy_line(progress.name, done, total, rate, screen.width, screen.signs)])
            await trio.sleep(REFRESH_SECONDS)
