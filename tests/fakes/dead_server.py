"""A file server that does not answer: one call waits for it in its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import trio

from tests.harness.hang import HANG_SECONDS


class DeadServer:
    """A file server under the calls that `under` has made, until `revive`, or the end of the context."""

    def __init__(self) -> None:
        self.waiting = False  # whether a thread waits for it
        self._alive = threading.Event()

    def under(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, which waits for the server first."""

        def waits(*args: Any, **options: Any) -> Any:
            self.waiting = True
            self._alive.wait(HANG_SECONDS)
            self.waiting = False
            return call(*args, **options)

        return waits

    async def asked(self) -> None:
        """Return when a thread waits for it."""
        with trio.fail_after(HANG_SECONDS):
            while not self.waiting:  # noqa: ASYNC110 - a thread's doing
                await trio.sleep(0.001)

    def revive(self) -> None:
        """Let the calls go on."""
        self._alive.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.revive()
