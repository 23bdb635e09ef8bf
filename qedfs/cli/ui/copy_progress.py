"""The progress bar of a command that copies or checks: how many bytes are done, and a bar of that on a terminal.

Owns the count and the drawing. Must not know what is copied.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from qedfs.control.monitoring.progress_rate import Rate

if TYPE_CHECKING:
    from qedfs.cli.ui.screen import Screen

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
    import trio  # here, as most copies have no terminal, and a check has no event loop

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_draw, progress)
        yield
        nursery.cancel_scope.cancel()


async def _draw(progress: CopyProgress) -> None:
    import trio

    rate = Rate()
    with _screen() as screen:
        while True:
            rate.note(trio.current_time(), progress.done)
            if progress.total:
                _show(screen, progress, rate)
            await trio.sleep(REFRESH_SECONDS)


@contextlib.contextmanager
def drawn_by_work(
    name: str, total: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """For work without an event loop: give it a function to call, often, with the bytes that are done.

    It draws a bar on standard error every REFRESH_SECONDS, but not before, and only if that is a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    progress, rate, due = CopyProgress(name), Rate(), clock() + REFRESH_SECONDS
    progress.total = total
    screen: Screen | None = None

    def told(done: int) -> None:
        nonlocal screen, due
        now = clock()
        if now < due:
            return
        due, progress.done = now + REFRESH_SECONDS, done
        rate.note(now, done)
        screen = screen or stack.enter_context(_screen())
        _show(screen, progress, rate)

    with contextlib.ExitStack() as stack:
        yield told


def _screen() -> Screen:
    # Imported here because loading rich is slow, and most copies have no terminal.
    from qedfs.cli.ui.output import console
    from qedfs.cli.ui.screen import Screen

    return Screen(console(stderr=True), transient=True)


def _show(screen: Screen, progress: CopyProgress, rate: Rate) -> None:
    from qedfs.cli.ui.bars import copy_line

    total = progress.total * progress.passes
    done = min(progress.done, total)
    screen.show([copy_line(progress.name, done, total, rate, screen.width, screen.signs)])
