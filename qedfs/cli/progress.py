"""Progress bars of a mount in the foreground: one per image, or one for all where there are many."""

from __future__ import annotations

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from qedfs.control.port import Mounted, ServedImage
from qedfs.control.rate import Rate
from qedfs.stream.job import State
from qedfs.units import format_seconds, format_size

MOST_BARS = 10
REFRESH_SECONDS = 0.25
TOTAL = "all images"


class Bars:
    """Bars that follow a mount until cancelled."""

    def __init__(self, mount: Mounted, console: Console) -> None:
        self._mount = mount
        self._rates: dict[str, Rate] = {}
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}", justify="right"),
            console=console,
            auto_refresh=False,
            expand=True,
            transient=True,
        )

    async def run(self) -> None:
        """Draw."""
        with self._progress:
            while True:
                self._update()
                self._progress.refresh()
                await trio.sleep(REFRESH_SECONDS)

    def _update(self) -> None:
        served = [found for found in self._mount.everything() if found.job is not None]
        wanted = {found.name for found in served} if len(served) <= MOST_BARS else {TOTAL}
        for name in self._tasks.keys() - wanted:
            self._progress.remove_task(self._tasks.pop(name))
        if len(served) > MOST_BARS:
            self._draw_total(served)
            return
        for found in served:
            job = found.job
            if job is not None:
                self._draw(found.name, job.populated, job.total, self._note(found))

    def _draw_total(self, served: list[ServedImage]) -> None:
        jobs = [found.job for found in served if found.job is not None]
        done, total = sum(job.populated for job in jobs), sum(job.total for job in jobs)
        complete = sum(job.state is State.COMPLETE for job in jobs)
        pace = self._pace(TOTAL, done, total)
        self._draw(TOTAL, done, total, f"{complete} of {len(jobs)} complete{pace and ', '}{pace}")

    def _draw(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=max(1, total), note=note)
        # An image of no bytes is a full bar.
        self._progress.update(self._tasks[name], completed=done if total else 1, note=note)

    def _note(self, found: ServedImage) -> str:
        """What stands behind the bar: the pace while it streams, else the state."""
        job = found.job
        if job is None or job.state is not State.RUNNING:
            return "" if job is None else str(job.state)
        return self._pace(found.name, job.populated, job.total) or str(job.state)

    def _pace(self, name: str, done: int, total: int) -> str:
        rate = self._rates.setdefault(name, Rate())
        rate.note(trio.current_time(), done)
        seconds = rate.seconds_for(total - done)
        if not seconds:
            return ""
        return f"{format_size(rate.value)}/s, {format_seconds(seconds)}"
