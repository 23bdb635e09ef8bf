"""The reads of an image that wait for its source: who ends them, and how."""

from __future__ import annotations

import trio

from qedfs.image.waiting_reads import WaitingReads


async def test_the_oldest_read_is_the_one_that_counts(autojump_clock: trio.testing.MockClock) -> None:
    reads = WaitingReads()
    with reads.waiting() as first:
        await trio.sleep(3)
        with reads.waiting():
            assert reads.since == first.since == trio.current_time() - 3
    assert reads.since is None


async def test_only_reads_that_were_there_at_that_time_are_given_up(autojump_clock: trio.testing.MockClock) -> None:
    reads = WaitingReads()
    with reads.waiting() as old:
        await trio.sleep(1)
        then = trio.current_time()
        await trio.sleep(1)
        with reads.waiting() as late:
            reads.give_up(since=then)
            assert (old.ended, late.ended) == ("nobody waits for this read any more", "")
            ended = []
            for read in (old, late):  # `old` was given up before its attempt began
                with read.attempt():
                    await trio.sleep(1)
                    ended.append(read)
            assert ended == [late]


async def test_run_again_ends_attempts_and_not_reads(autojump_clock: trio.testing.MockClock) -> None:
    reads = WaitingReads()
    attempts = 0

    async def read() -> None:
        nonlocal attempts
        with reads.waiting() as one:
            for seconds in (100, 5):
                with one.attempt():
                    attempts += 1
                    await trio.sleep(seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(1)
        reads.run_again()
        began = trio.current_time()
        await reads.answered()
        assert (attempts, trio.current_time() - began) == (2, 5)


async def test_reads_that_begin_later_are_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    reads = WaitingReads()
    with reads.waiting():
        waiting = trio.lowlevel.current_task()
        assert waiting is not None
        with trio.move_on_after(1) as scope:
            await reads.answered()
        assert scope.cancelled_caught
    with trio.fail_after(0):
        await reads.answered()
