"""Looks after all images of a mount, in one task: commits what has become old, and inspects the overlay files.

Owns the rhythm. A task of its own for each image would wake 1,000 times a second in a mount of 1,000 images, and take
an eighth of a processor. What may take time runs in a task of the image, so that one image delays no other. Must not
know what a commit or an inspection does, nor what follows from it.

An image rests while it is complete, nobody has it open and nothing of it waits to be committed: only another program
could change its file. In a large mount most images rest, so these take turns: each round visits RESTING_AT_ONCE of
them, or as many as it takes to visit each one within RESTING_ROUNDS rounds. Every other image is visited in each round.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import trio

from qedfs.host.beat import next_beat
from qedfs.image.commit_schedule import COMMIT_SECONDS
from qedfs.image.image import Image
from qedfs.image.outage import look_at_source
from qedfs.mount.served import Served

ROUND_SECONDS = 1.0
RESTING_AT_ONCE = 32
RESTING_ROUNDS = 8


class Visited:
    """One image in the rounds. Not used any more once its nursery is cancelled."""

    def __init__(
        self,
        served: Served,
        image: Image,
        nursery: trio.Nursery,
        inspect: Callable[[], Awaitable[bool]],
        *,
        always: bool,
        tell: Callable[[Served], None] = lambda _: None,
    ) -> None:
        """`nursery` runs the image's tasks. `inspect` returns False if there is nothing to inspect any more.

        `always`: also inspect a file that nobody has changed since the last inspection. `tell`: tells the holder of the
        mount, if there is one, what the next server has to know of the image.
        """
        self.served = served
        self._image = image
        self._nursery = nursery
        self._inspect = inspect
        self._always = always
        self._tell = tell
        self._inspecting = self._tending = False
        self._inspected_for_good = False
        self._tended_at = trio.current_time()

    @property
    def rests(self) -> bool:
        """Whether nothing of the image can change before somebody opens it."""
        busy = self.served.opens or self._tending or self._inspecting
        return self._image.complete and self._image.calm and not busy

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
        self._tell(self.served)

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
    """The rounds of one mount. `opened`: where images are put when they are opened, even if they are closed again."""

    def __init__(self, opened: set[Served]) -> None:
        self._opened = opened
        self._awake: dict[Served, Visited] = {}
        self._resting: dict[Served, Visited] = {}  # in the order of their last visits

    def add(self, visited: Visited) -> None:
        """Visit an image from the next round on."""
        self._awake[visited.served] = visited

    def leave_out(self, visited: Visited) -> None:
        """Visit an image no more. Call it before its nursery closes."""
        self._awake.pop(visited.served, None)
        self._resting.pop(visited.served, None)

    async def run(self) -> None:
        """Make the rounds, until cancelled."""
        while True:
            await next_beat(ROUND_SECONDS)
            self._wake_up()
            for visited in [*self._awake.values()]:
                # Before the visit, which may begin something. Whoever changes it after this one has opened it.
                rests = visited.rests
                self._visit(visited)
                if rests and visited.rests:
                    del self._awake[visited.served]
                    self._resting[visited.served] = visited

    def _wake_up(self) -> None:
        """Have in this round the images that were opened, and those of the others whose turn it is."""
        while self._opened:
            served = self._opened.pop()
            if (visited := self._resting.pop(served, None)) is not None:
                self._awake[served] = visited
        count = max(RESTING_AT_ONCE, -(-len(self._resting) // RESTING_ROUNDS))
        for served in [*itertools.islice(self._resting, count)]:
            self._awake[served] = self._resting.pop(served)

    def _visit(self, visited: Visited) -> None:
        try:
            visited.look()
        except Exception as exc:
            visited.fail(exc)
