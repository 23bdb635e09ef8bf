"""The worker threads of one overlay: for its calls that may wait for the disk.

Owns how a call gets into a thread and its result back. Must not know what the call does.

trio is imported where it is used, which costs 0.2 us. `qedfs check` uses no event loop, and half of its time in a large
overlay would be the start of trio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from qedfs.errors import QedfsError

if TYPE_CHECKING:
    import trio
    from outcome import Outcome

T = TypeVar("T")

# Threads per overlay: enough to keep a deep disk queue busy with reads during all adoptions (`adoption.py`), and few
# enough that a disk that hangs affects only its own overlays.
THREADS = 12


class Threads:
    """Part of a `Storage`. Its methods are for the event loop."""

    _limiter: trio.CapacityLimiter | None = None

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run in a worker thread of trio. Cancellation waits for the end of the call, so no write is in doubt.

        As `trio.to_thread.run_sync`, without what a call that knows nothing of trio does not need (a context, a way
        back into trio): 90 us of processor time instead of 150.
        """
        import trio

        await trio.lowlevel.checkpoint_if_cancelled()
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(THREADS)
        try:
            self._limiter.acquire_on_behalf_of_nowait(task)
        except trio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(task)

        def deliver(result: Outcome[T]) -> None:
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        try:
            trio.lowlevel.start_thread_soon(function, deliver)
            return cast("T", await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED))
        finally:
            self._limiter.release_on_behalf_of(task)

    def begin_in_thread(self, function: Callable[[], None], ended: Callable[[Exception | None], None]) -> None:
        """Run a call in one of trio's worker threads, not counted among THREADS: the committer has one at a time."""
        import trio
        from outcome import Error  # what trio returns the results of threads in

        def deliver(result: Outcome[None]) -> None:
            error = result.error if isinstance(result, Error) else None
            # A thread of trio's gets nothing that is no Exception: signals arrive in the main thread.
            ended(error if error is None or isinstance(error, Exception) else QedfsError(repr(error)))

        trio.lowlevel.start_thread_soon(function, deliver)
