"""One attempt at a time, for all tasks that ask for its result: they share the result, or the error.

Owns the attempt that is under way. Must not know what is attempted. If each task made its own attempt, one after the
other, the last one would wait for the deadlines of all before it.

An attempt is a task of its own: cancelling a task that waits for it, even the one that asked first, takes nothing from
the others. Nothing is kept when it has ended: the next task that asks starts another attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from qedfs.errors import QedfsError

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Attempt(Generic[T]):
    def __init__(self) -> None:
        self.over = trio.Event()
        self.results: list[T] = []  # one, or none if it has failed
        self.error: QedfsError | None = None


class SingleFlight(Generic[T]):
    """Shares the attempts of one function."""

    def __init__(
        self,
        nursery: trio.Nursery,
        function: Callable[[], Awaitable[T]],
        *,
        name: str,
        cancelled: Callable[[], QedfsError],
    ) -> None:
        """`nursery`: where attempts run. `name`: of the attempt, for the log of what should not happen.

        `cancelled`: makes the error of an attempt that was cancelled with its nursery. A task of another nursery may
        have waited for it.
        """
        self._nursery = nursery
        self._function = function
        self._name = name
        self._cancelled = cancelled
        self._attempt: _Attempt[T] | None = None

    async def result(self) -> T:
        """The result of the attempt under way, or of a new one.

        Raises:
            QedfsError: as the function does, as a new object for each task; or what `cancelled` made.
        """
        attempt = self._attempt
        if attempt is None:
            attempt = _Attempt[T]()
            # First: a nursery that has ended refuses, and the next task would wait for an attempt that never began.
            self._nursery.start_soon(self._run, attempt)
            self._attempt = attempt
        await attempt.over.wait()
        if attempt.error is not None:
            raise attempt.error.fresh()
        return attempt.results[0]

    async def _run(self, attempt: _Attempt[T]) -> None:
        try:
            attempt.results.append(await self._function())
        except QedfsError as exc:
            attempt.error = exc
        except Exception:
            # A fault of ours must not end the nursery, which serves other images as well.
            log.exception("%s", self._name)
            attempt.error = QedfsError("internal error, see the log")
        finally:
            if not attempt.results and attempt.error is None:
                attempt.error = self._cancelled()
            # Both without an await in between: a task that joined now would get what is already over.
            self._attempt = None
            attempt.over.set()
