"""The lock that a thread may release: nobody is forgotten, nobody gets it beside another."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from qedfs.overlay.lock import Lock


async def test_a_free_lock_takes_no_turn_of_the_event_loop() -> None:
    lock = Lock()
    async with trio.open_nursery() as nursery:
        ran = trio.Event()
        nursery.start_soon(trio.to_thread.run_sync, ran.is_set)  # something is ready to run
        nursery.start_soon(set_event, ran)
        async with lock:
            assert not ran.is_set()


async def set_event(event: trio.Event) -> None:
    event.set()


async def test_those_who_wait_get_it_in_their_order() -> None:
    lock, order = Lock(), []

    async def use(number: int) -> None:
        async with lock:
            order.append(number)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        assert lock.take_now()
        for number in range(5):
            nursery.start_soon(use, number)
            await trio.testing.wait_all_tasks_blocked()
        assert not lock.take_now()
        lock.release()
        # It has been handed over: who asks now comes after those who wait.
        assert not lock.take_now()
    assert order == [0, 1, 2, 3, 4]
    assert lock.take_now()


async def test_whoever_gives_up_waiting_is_left_out() -> None:
    lock = Lock()
    assert lock.take_now()
    with trio.move_on_after(0):
        async with lock:
            raise AssertionError("it was taken")
    lock.release()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with lock:
            raise AssertionError("cancelled before")
    assert lock.take_now()


async def test_whoever_is_cancelled_after_it_was_handed_over_has_it() -> None:
    lock = Lock()
    assert lock.take_now()
    had = False

    async def wait(scope: trio.CancelScope) -> None:
        nonlocal had
        with scope:
            async with lock:
                had = True
                assert not lock.take_now()

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(wait, scope)
        await trio.testing.wait_all_tasks_blocked()
        lock.release()
        scope.cancel()
    assert had
    assert lock.take_now()


@pytest.mark.parametrize("seed", range(3))
async def test_threads_that_release_it_forget_nobody(seed: int) -> None:
    """A task begins to wait while a thread releases, again and again."""
    lock, rng, token = Lock(), random.Random(seed), trio.lowlevel.current_trio_token()
    inside = done = 0

    async def use() -> None:
        nonlocal inside, done
        for _ in range(100):
            async with lock:
                inside += 1
                assert inside == 1
                if rng.random() < 0.5:
                    await trio.lowlevel.checkpoint()
                inside -= 1
            done += 1
            if rng.random() < 0.5 and lock.take_now():
                trio.lowlevel.start_thread_soon(lambda: lock.release_in_thread(token), lambda _: None)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(use)
    assert done == 400
