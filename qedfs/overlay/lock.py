"""A lock of the event loop that a thread may release. Imports nothing of the project.

Owns who has it and who waits. `trio.Lock` takes a turn of the event loop even if it is free, and belongs to a task; an
fsync of one barrier is begun by a task and ended by the thread that has run the barrier, without a turn of the loop.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

import trio


class Lock:
    """First come, first served. All methods but `release_in_thread` are for the event loop."""

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[trio.lowlevel.Task] = deque()
        self._mutex = threading.Lock()  # so that nobody begins to wait between a look for waiters and a release

    def take_now(self) -> bool:
        """Take it if it is free. Whoever has taken it releases it."""
        with self._mutex:
            if self._held:
                return False
            self._held = True
            return True

    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        with self._mutex:
            if not self._held:
                self._held = True
                return
            self._waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            with self._mutex:
                if task not in self._waiting:
                    return trio.lowlevel.Abort.FAILED  # it has been handed the lock
                self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Hand it to the task that has waited longest, if there is one."""
        with self._mutex:
            if not self._waiting:
                self._held = False
                return
            task = self._waiting.popleft()
        trio.lowlevel.reschedule(task)

    def release_in_thread(self, token: trio.lowlevel.TrioToken) -> None:
        """Release it in any thread. `token`: of the event loop, which is woken only if a task waits."""
        with self._mutex:
            if not self._waiting:
                self._held = False
                return
        token.run_sync_soon(self.release)
