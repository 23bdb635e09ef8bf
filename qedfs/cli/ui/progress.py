"""The progress bars of a mount in the foreground."""

from __future__ import annotations

import trio
from rich.console import Console

from qedfs.cli.ui.bars import bar_lines
from qedfs.cli.ui.screen import Screen
from qedfs.control.monitoring.progress_rate import Rate
from qedfs.control.monitoring.status import image_status
from qedfs.control.port import Mounted, ServedImage

REFRESH_SECONDS = 0.5


class Bars:
    """Bars that follow a mount until cancelled."""

    def __init__(self, mount: Mounted, console: Console) -> None:
        self._mount = mount
        self._console = console
        self._rates: dict[str, Rate] = {}

    async def run(self) -> None:
        """Draw the bars every REFRESH_SECONDS."""
        with Screen(self._console, transient=True) as screen:
            while True:
                images = [image_status(served, self._rate(served)) for served in self._mount.everything()]
                screen.show(bar_lines(images, screen.width, screen.height, screen.signs))
                await trio.sleep(REFRESH_SECONDS)

    def _rate(self, served: ServedImage) -> Rate:
        rate = self._rates.setdefault(served.path, Rate())
        if served.job is not None:
            rate.note(trio.current_time(), served.job.moved)
        return rate
