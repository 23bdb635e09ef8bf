"""What `qedfs wait` does, without click.

Owns the deadline, what is shown meanwhile, and what an end of the mount means for the result. Must not know by which
fields an image shows that it is there (`cli/wait_goal.py`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from qedfs.cli.served_images import MOST_NAMED, Image, Released, connect, fetch
from qedfs.cli.takeovers import Patience, is_between_servers
from qedfs.cli.ui.layout import listed
from qedfs.cli.ui.output import console, print_json, remark
from qedfs.cli.ui.progress_lines import ProgressLines
from qedfs.cli.wait_goal import Goal, Unused, parse_goal
from qedfs.control.qmp.client import Client, Gone
from qedfs.errors import NotMounted, QedfsError, TimedOut

POLL_SECONDS = 0.5  # between polls; an event reports the end of a job at once
USUAL_GOAL = "complete"


def wait(
    mountpoint: str | None = None,
    image: str | None = None,
    *,
    timeout: float | None = None,
    goal: str = USUAL_GOAL,
    place: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """See the command's help. `place`: what was mounted."""
    waited = parse_goal(goal)
    waiting = _Waiting(mountpoint or "", image, waited, timeout, quiet=quiet)
    error: QedfsError | None = None
    try:
        if mountpoint is None:
            from qedfs.cli.found_mounts import mount_meant  # here, because whoever names the mount does not need it

            waiting.mountpoint = mount_meant(None)
        _wait(waiting, image, place)
    except QedfsError as exc:
        error = exc
        raise
    finally:
        # Not after Ctrl-C, nor after a bug: there is no result.
        if as_json and (error is not None or sys.exc_info()[0] is None):
            print_json(waiting.result(goal, error))


def _wait(waiting: _Waiting, image: str | None, place: str | None) -> None:
    """Wait at the mount, or look at the overlays if it has ended."""
    try:
        _wait_at(waiting)
    except NotMounted as exc:
        waiting.mounted = False
        if isinstance(exc, Gone) and isinstance(waiting.goal, Unused):
            return
        # With --until-streamed the mount ends as soon as all images are complete.
        if waiting.images and all(_stands_alone(found["overlay"]) for found in waiting.images):
            return
        if place is None:
            raise _explained(exc, waiting.mountpoint) from exc
        # Imported here because reading an overlay needs trio, and a wait on a mount that serves reads none.
        from qedfs.cli.overlay_files import overlays_at, stands_alone

        left = [overlay for overlay in overlays_at(place, image) if not stands_alone(overlay)]
        if left:
            raise NotMounted(f"{exc}, and not complete: {listed(left, MOST_NAMED)}") from exc


def _wait_at(waiting: _Waiting) -> None:
    """Wait at the mount, whichever servers it has meanwhile. Raises Gone if it ends."""
    gone: Gone | None = None
    while True:
        try:
            with connect(waiting.mountpoint, deadline=waiting.deadline) as client:
                waiting.run(client)
            return
        except Gone as exc:
            gone = exc
            if not is_between_servers(waiting.mountpoint):
                raise
            waiting.patience.ended(waiting.mountpoint)
        except NotMounted as exc:
            raise gone or exc from exc


class _Waiting:
    """One wait: the goal, the deadline, and the last status of the images."""

    def __init__(
        self, mountpoint: str, image: str | None, goal: Goal, timeout_seconds: float | None, *, quiet: bool
    ) -> None:
        self.images: list[Image] = []
        self.mounted = True
        self.mountpoint = mountpoint  # "" until it is found, if the user has not named it
        self._quiet = quiet
        self._progress = ProgressLines()
        self._image = image
        self.goal = goal
        self.deadline = float("inf") if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._remarked: set[tuple[str, str]] = set()
        self.patience = Patience()

    def run(self, client: Client) -> None:
        """Return when all images have reached the goal, including any that have just appeared in the folder."""
        client.execute("x-qedfs-rescan")
        self._watch(client)
        if not (self.images or self._image or self._quiet):
            remark(f"{self.mountpoint}: has no overlays, so there is nothing to wait for")

    def result(self, goal: str, error: QedfsError | None) -> dict[str, Any]:
        """What --json prints."""
        return {
            "mountpoint": os.path.abspath(self.mountpoint) if self.mountpoint else None,
            "goal": goal,
            "reached": error is None,
            "error": None if error is None else str(error),
            "exit_code": 0 if error is None else error.exit_code,
            "mounted": self.mounted and not isinstance(error, NotMounted),
            "images": self.images,
        }

    def _watch(self, client: Client) -> None:
        if self._quiet:
            self._wait(client, lambda: None)
            return
        if not sys.stderr.isatty():
            self._wait(client, self._print_progress)
            return
        # Imported here because loading rich is slow, and a script that waits has no terminal.
        from qedfs.cli.ui.bars import bar_lines
        from qedfs.cli.ui.screen import Screen

        with Screen(console(stderr=True), transient=True) as screen:
            self._wait(client, lambda: screen.show(bar_lines(self.images, screen.width, screen.height, screen.signs)))

    def _wait(self, client: Client, show: Callable[[], None]) -> None:
        while not self._reached_by_all(client):
            show()
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimedOut(f"{self.mountpoint}: not {self.goal} within the timeout: {self._summary()}")
            client.event(min(left, POLL_SECONDS))

    def _reached_by_all(self, client: Client) -> bool:
        if not self._reached(client):
            return False
        # The server scans for new overlays once a second, so it may not have seen the latest one.
        client.execute("x-qedfs-rescan")
        return self._reached(client)

    def _reached(self, client: Client) -> bool:
        try:
            self.images = fetch(client, self._image, self.mountpoint)
        except Released:
            return True  # it was complete, and nobody had it open
        self.patience.answered()
        # Check all images, so that the failure of one is reported even if another is not ready.
        reached = [self.goal.reached(client, image) for image in self.images]
        return all(reached)

    def _print_progress(self) -> None:
        self._remark_held()
        if isinstance(self.goal, Unused):
            return
        line = self._progress.line(time.monotonic(), self.images)
        if line is not None:
            remark(f"{self.mountpoint}: {line}")

    def _remark_held(self) -> None:
        """Print a remark, once for each state, about an image that does not go on by itself."""
        for image in self.images:
            held, key = self.goal.held(image), (image["name"], image["state"])
            if held is not None and key not in self._remarked:
                self._remarked.add(key)
                remark(f"{image['name']} {held}")

    def _summary(self) -> str:
        states = [(image["name"], self.goal.lacking(image)) for image in self.images]
        return listed([f"{name} {state}" for name, state in states if state is not None], MOST_NAMED)


def _explained(exc: NotMounted, mountpoint: str) -> NotMounted:
    if isinstance(exc, Gone):
        return NotMounted(f"{mountpoint}: the mount has ended before the images were complete")
    from qedfs.cli.mount_table import mounted_type  # here: see `wait`

    if mounted_type(mountpoint) is not None:
        return exc
    return NotMounted(f"{exc}; if --until-streamed has ended it, --overlay OVERLAY shows whether it is complete")


def _stands_alone(overlay: str) -> bool:
    """Whether the overlay file is complete. False if it cannot be read."""
    from qedfs.cli.overlay_files import stands_alone  # see `wait`

    try:
        return stands_alone(overlay)
    except QedfsError:
        return False
