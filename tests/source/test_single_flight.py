"""Many tasks, one attempt: its result or its error for all of them, whoever is cancelled."""

from __future__ import annotations

import pytest
import trio

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.source.single_flight import SingleFlight


class Work:
    """Attempts that wait for `go`, and then end as the test wants."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.begun = 0
        self.go = trio.Event()
        self.error: Exception | None = None
        self.shared = SingleFlight(nursery, self._attempt, name="work", cancelled=lambda: SourceUnreachable("closed"))
        self.results: list[int | QedfsError] = []

    async def _attempt(self) -> int:
        self.begun += 1
        number = self.begun
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return number

    async def ask(self) -> None:
        try:
            self.results.append(await self.shared.result())
        except QedfsError as exc:
            self.results.append(exc)


async def test_many_tasks_share_one_attempt() -> None:
    async with trio.open_nursery() as attempts, trio.open_nursery() as nursery:
        work = Work(attempts)
        for _ in range(10):
            nursery.start_soon(work.ask)
        await trio.testing.wait_all_tasks_blocked()
        work.go.set()
    assert (work.begun, work.results) == (1, [1] * 10)


async def test_nothing_is_kept() -> None:
    async with trio.open_nursery() as attempts:
        work = Work(attempts)
        work.go.set()
        for _ in range(3):
            await work.ask()
    assert work.results == [1, 2, 3]


async def test_each_task_gets_an_error_of_its_own() -> None:
    async with trio.open_nursery() as attempts, trio.open_nursery() as nursery:
        work = Work(attempts)
        work.error = SourceUnreachable("no answer")
        for _ in range(3):
            nursery.start_soon(work.ask)
        await trio.testing.wait_all_tasks_blocked()
        work.go.set()
    assert [str(result) for result in work.results] == ["no answer"] * 3
    assert len({id(result) for result in [*work.results, work.error]}) == 4
    work.error = None
    assert work.begun == 1


async def test_an_attempt_outlives_the_task_that_asked_first() -> None:
    async with trio.open_nursery() as attempts:
        work = Work(attempts)
        async with trio.open_nursery() as others:
            async with trio.open_nursery() as first:
                first.start_soon(work.ask)
                await trio.testing.wait_all_tasks_blocked()
                others.start_soon(work.ask)
                await trio.testing.wait_all_tasks_blocked()
                first.cancel_scope.cancel()
            work.go.set()
    assert (work.begun, work.results) == (1, [1])


async def test_an_attempt_that_nobody_waits_for_is_there_for_the_next_task() -> None:
    async with trio.open_nursery() as attempts:
        work = Work(attempts)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as first:
                first.start_soon(work.ask)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        work.go.set()
        assert await work.shared.result() == 1
    assert work.begun == 1


async def test_a_task_that_asks_after_the_end_gets_a_new_attempt() -> None:
    """Even if the others have not been woken yet."""
    async with trio.open_nursery() as attempts:
        work = Work(attempts)

        async def ask_twice() -> None:
            await work.ask()
            await work.ask()

        work.go.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_twice)
            nursery.start_soon(ask_twice)
    assert sorted(map(str, work.results)) == ["1", "1", "2", "2"]


async def test_the_end_of_the_nursery_is_told_to_tasks_of_others() -> None:
    async with trio.open_nursery() as nursery, trio.open_nursery() as attempts:
        work = Work(attempts)
        nursery.start_soon(work.ask)
        await trio.testing.wait_all_tasks_blocked()
        attempts.cancel_scope.cancel()
    assert [(type(result), str(result)) for result in work.results] == [(SourceUnreachable, "closed")]


async def test_nobody_waits_for_an_attempt_that_cannot_begin() -> None:
    async with trio.open_nursery() as attempts:
        work = Work(attempts)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            await work.shared.result()


@pytest.mark.expect_log("work")
async def test_a_fault_of_ours_ends_neither_the_nursery_nor_the_wait() -> None:
    async with trio.open_nursery() as attempts:
        work = Work(attempts)
        work.error = ZeroDivisionError("a fault")
        work.go.set()
        await work.ask()
        work.error = None
        await work.ask()
    assert str(work.results[0]) == "internal error, see the log"
    assert work.results[1] == 2
