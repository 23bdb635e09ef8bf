"""The stand-in for trio under which pyfuse3 waits: nobody is forgotten, nobody starves, idle polling ends."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import trio

from qedfs.mount.fuse_wait import CREDIT, PAUSE, POLLS, REQUESTS_PER_YIELD, Lock, Poller, Trio, next_request
from tests.harness.hang import HANG_SECONDS


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


class Polls:
    """A poll object that counts, and says yes after so many looks."""

    def __init__(self, yes_after: int) -> None:
        self.count = 0
        self.yes_after = yes_after

    def register(self, fd: int, events: int) -> None:
        """As select.poll."""

    def poll(self, timeout: int) -> list[int]:
        assert timeout == 0
        self.count += 1
        return [1] if self.count > self.yes_after else []


@pytest.fixture(autouse=True)
def _expected_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the handlers of another test have expected."""
    monkeypatch.setattr(next_request, "late", False)


def patience(polls: Polls, monkeypatch: pytest.MonkeyPatch) -> Poller:
    monkeypatch.setattr("select.poll", lambda: polls)
    return Poller(0)


def test_a_request_that_is_there_costs_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = Polls(0)
    assert patience(polls, monkeypatch).readable()
    assert polls.count == 1


def test_a_request_that_comes_soon_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = Polls(POLLS)
    assert patience(polls, monkeypatch).readable()
    assert polls.count == POLLS + 1


def test_a_request_that_is_expected_late_costs_one_look_and_the_next_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    polls = Polls(POLLS)
    poller = patience(polls, monkeypatch)
    monkeypatch.setattr(next_request, "late", True)
    assert not poller.readable()
    assert polls.count == 1
    assert poller.readable()
    assert polls.count == POLLS + 1
    assert not next_request.late


def test_polling_that_does_not_pay_ends_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = Polls(10**9)
    patient = patience(polls, monkeypatch)
    looks = []
    for _ in range(2 * (CREDIT + PAUSE)):
        before = polls.count
        assert not patient.readable()
        looks.append(polls.count - before)
    assert looks[:CREDIT] == [1 + POLLS] * CREDIT
    assert looks[CREDIT:].count(1 + POLLS) <= 2
    assert sum(looks[CREDIT:]) < 4 * len(looks[CREDIT:])


def test_after_a_pause_one_request_that_comes_soon_brings_polling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = Polls(10**9)
    patient = patience(polls, monkeypatch)
    for _ in range(CREDIT + PAUSE):
        patient.readable()
    polls.yes_after = polls.count + 2
    assert patient.readable()
    polls.yes_after = polls.count + POLLS
    assert patient.readable()


async def test_others_get_their_turn_while_requests_keep_coming(pipe: tuple[int, int]) -> None:
    lowlevel = Trio().lowlevel
    os.write(pipe[1], b"x")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(10 * REQUESTS_PER_YIELD):
            await lowlevel.wait_readable(pipe[0])
        nursery.cancel_scope.cancel()
    assert turns >= 8


async def test_waits_for_what_is_not_there_yet(pipe: tuple[int, int]) -> None:
    lowlevel = Trio().lowlevel
    arrived = trio.Event()

    async def wait() -> None:
        await lowlevel.wait_readable(pipe[0])
        arrived.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not arrived.is_set()
        os.write(pipe[1], b"x")
        with trio.fail_after(HANG_SECONDS):
            await arrived.wait()


async def test_the_lock_costs_its_last_holder_no_turn_of_the_scheduler() -> None:
    lock = Lock()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(100):
            async with lock:
                pass
        assert not turns
        nursery.cancel_scope.cancel()


class Wakings(trio.abc.Instrument):
    """The names of the tasks that are woken."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.names.append(task.name)


async def test_a_waiting_task_is_woken_only_when_the_holder_waits_for_something_else() -> None:
    lock = Lock()
    wakings = Wakings()
    entered = trio.Event()

    async def second() -> None:
        async with lock:
            entered.set()

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(second, name="second")
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.add_instrument(wakings)
        for _ in range(100):  # requests that are answered at once
            async with lock:
                await trio.lowlevel.checkpoint()
        assert "second" not in wakings.names
        assert not entered.is_set()
        with trio.fail_after(HANG_SECONDS):
            await entered.wait()  # a request that takes longer
    trio.lowlevel.remove_instrument(wakings)
    assert wakings.names.count("second") == 1


@pytest.mark.parametrize("seed", range(20))
async def test_one_holder_at_a_time_and_nobody_is_forgotten(seed: int) -> None:
    rng = random.Random(seed)
    lock = Lock()
    holders = 0
    entered = 0

    async def use() -> None:
        nonlocal holders, entered
        for _ in range(50):
            with trio.CancelScope() as scope:
                if rng.random() < 0.2:
                    # Killed while it waits, or while it holds the lock.
                    nursery.start_soon(cancel, scope)
                async with lock:
                    holders += 1
                    entered += 1
                    try:
                        assert holders == 1
                        for _ in range(rng.randrange(3)):
                            await trio.lowlevel.checkpoint()
                    finally:
                        holders -= 1
            for _ in range(rng.randrange(2)):
                await trio.lowlevel.checkpoint()

    async def cancel(scope: trio.CancelScope) -> None:
        for _ in range(rng.randrange(4)):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.fail_after(HANG_SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(use)
    assert entered > 200
    assert not holders
