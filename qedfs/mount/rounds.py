"""Looks after all images of a mount, in one task: commits what has become old, and inspects the overlay files.

Owns the rhythm. A round costs some microseconds per image that has nothing to do. A task of its own for each image
would wake 1,000 times a second in a mount of 1,000 images, and take an eighth of a processor. What may take time runs
in a task of the image, so that one image delays no other. Must not know what a commit or an inspection does, nor what
follows from it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from qedfs.image.image import COMMIT_SECONDS, Image
from qedfs.image.outage import look_at_source

ROUND_SECONDS = 1.0


class Visited:
    """One image in the rounds. Not used any more once its nursery is cancelled."""

    def __init__(
        self, image: Image, nursery: trio.Nursery, inspect: Callable[[], Awaitable[bool]], *, always: bool
    ) -> None:
        """`nursery` runs the image's tasks. `inspect` returns False if there is nothing to inspect any more.

        `always`: also inspect a file that nobody has changed since the last inspection.
        """
        self._image = image
        self._nursery = nursery
        self._inspect = inspect
        self._always = always
        self._inspecting = self._tending = False
        self._inspected_for_good = False
        self._tended_at = trio.current_time()

    def look(self) -> None:
        """Start what is due. Returns at once."""
        image = self._image
        look_at_source(image)
        if not (self._tending or image.calm):
            now = trio.current_time()
            if now - self._tended_at >= COMMIT_SECONDS - ROUND_SECONDS / 2:  # as a round may come a little early
                self._tending, self._tended_at = True, now
                self._nursery.start_soon(self._tend)
        if not (self._inspecting or self._inspected_for_good) and (self._always or not image.overlay.seems_unchanged):
            self._inspecting = True
            self._nursery.start_soon(self._look_at_file)

    def fail(self, error: Exception) -> None:
        """Raise an error among the image's tasks."""
        self._nursery.start_soon(self._raise, error)

    async def _tend(self) -> None:
        await self._image.tend()
        self._tending = False

    async def _look_at_file(self) -> None:
        self._inspected_for_good = not await self._inspect()
        self._inspecting = False

    async def _raise(self, error: Exception) -> None:
        raise error


class Rounds:
    """The rounds of one mount."""

    def __init__(self) -> None:
        self._visited: set[Visited] = set()

    def add(self, visited: Visited) -> None:
        """Visit an image from the next round on."""
        self._visited.add(visited)

    def leave_out(self, visited: Visited) -> None:
        """Visit an image no more. Call it before its nursery closes."""
        self._visited.discard(visited)

    async def run(self) -> None:
        """Make the rounds, until cancelled."""
        while True:
            await trio.sleep(ROUND_SECONDS)
            for visited in self._visited:
                try:
                    visited.look()
                except Exception as exc:
                    visited.fail(exc)
