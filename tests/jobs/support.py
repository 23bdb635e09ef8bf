"""A kind of job for tests, and a driver that writes down what it is told."""

from __future__ import annotations

from typing import ClassVar, Unpack

import trio

from qedfs.errors import QedfsError
from qedfs.image.image import Image
from qedfs.jobs.job import Action, Driver, Job, JobOptions, usual_action
from qedfs.jobs.state import State

STEP_SECONDS = 1.0  # of the mock clock
STEP_BYTES = 1000


class CountJob(Job):
    """Counts to ten, in steps of `step_seconds`. A step fails with the error that `failures` has for its number."""

    kind: ClassVar[str] = "count"
    steps = 10
    step_seconds = STEP_SECONDS

    def __init__(self, image: Image, **options: Unpack[JobOptions]) -> None:
        super().__init__(image, **options)
        self.failures: dict[int, Exception] = {}
        self.counted: list[int] = []
        self.tried: list[tuple[float, int]] = []  # when, which step

    @property
    def progress(self) -> int:
        return len(self.counted) * STEP_BYTES

    @property
    def total(self) -> int:
        return self.steps * STEP_BYTES

    async def work(self) -> bool:
        while self.cursor < self.steps:
            if not self.allowed or self.hold_off():
                return False
            if self.cursor in self.counted:
                self.cursor += 1
            elif due := self.rate_limiter.due():
                await self.sleep(due)
            else:
                await self._step()
        self.cursor = 0
        return len(self.counted) == self.steps

    async def _step(self) -> None:
        number = self.cursor
        self.cursor += 1
        self.tried.append((trio.current_time(), number))
        self.rate_limiter.sent(STEP_BYTES)
        await trio.sleep(self.step_seconds)
        if number in self.failures:
            raise self.failures[number]
        self.counted.append(number)
        if self.hindered:
            self.makes_progress()

    async def finish(self) -> None:
        """Nothing is left to do."""


class Told(Driver):
    """Writes down what it is told; decides what it was made with."""

    def __init__(self, action: Action | None = None) -> None:
        """`action`: about every failure; None for what helps."""
        self.changes: list[tuple[State, str]] = []  # with the reason
        self.judged: list[str] = []
        self.finish = True
        self._action = action

    @property
    def states(self) -> list[State]:
        return [state for state, _ in self.changes]

    def changed(self, job: Job) -> None:
        self.changes.append((job.state, job.reason))

    def judge(self, job: Job, error: QedfsError) -> Action:
        self.judged.append(str(error))
        return self._action or usual_action(error)

    async def may_finish(self, job: Job) -> bool:
        if not self.finish:
            job.cancel()
        return self.finish
