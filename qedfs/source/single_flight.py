"""Single flight: tasks that need the result of the same call share one attempt, and its result or error.

Owns the running attempt. Must not know what it does. If each task made its own attempt, one after the other, the last
one would wait for the deadlines of all the others.

An attempt runs in a task of its own. So cancelling a task that waits for it, even the first one, does not affect the
others. Results are not cached: the next request after the end of an attempt starts another one.
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
        """`nursery`: where attempts run. `name`: what an attempt is called in the log if it fails because of a bug.

        `cancelled`: makes the error of an attempt that was cancelled with its nursery. A task of another nursery may
        have waited for it.
        """
        self._nursery = nursery
        self._function = function
        self._name = name
        self._cancelled = cancelled
        self._attempt: _Attempt[T] | None = None

    async def result(self) -> T:
        """The result of the running attempt, or of a new one.

        Raises:
            QedfsError: as the function does, as a new object for each task; or what `cancelled` made.
        """
        attempt = self._attempt
        if attempt is None:
            attempt = _Attempt[T]()
            # Before it is stored: a nursery that has ended refuses it, and later tasks would wait for it for ever.
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
            # A bug must not end the nursery, which serves other images as well.
            log.exception("%s", self._name)
            attempt.error = QedfsError("internal error, see the log")
        finally:
            if not attempt.results and attempt.error is None:
                attempt.error = self._cancelled()
            # No await since the function has ended: a task that joined in between would get an old result.
            self._attempt = None
            attempt.over.set()
