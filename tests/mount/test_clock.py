"""Time in which the event loop stood still does not count."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import trio

from qedfs.mount.clock import LONGEST_SLEEP_SECONDS, STALL_SECONDS, LoopClock
from tests.harness.hang import HANG_SECONDS
from tests.harness.process import wait_for
from tests.harness.servers import nbdkit

from .support import MIB, mounted_over, read_direct


class Hands:
    """The time that a clock is made of."""

    def __init__(self) -> None:
        self.seconds = 500.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def clock(hands: Hands) -> LoopClock:
    clock = LoopClock(hands)
    clock.start_clock()
    return clock


def test_it_goes_as_fast_as_others(clock: LoopClock, hands: Hands) -> None:
    began = clock.current_time()
    for _ in range(100):
        hands.seconds += 0.5
        clock.current_time()
    assert clock.current_time() - began == pytest.approx(50)


def test_a_wait_counts_if_it_is_as_long_as_it_was_to_be(clock: LoopClock, hands: Hands) -> None:
    began = clock.current_time()
    for _ in range(10):
        hands.seconds += clock.deadline_to_sleep_time(began + 1000)
        clock.current_time()
    assert clock.current_time() - began == pytest.approx(10 * LONGEST_SLEEP_SECONDS)


def test_waits_end_with_the_deadline(clock: LoopClock) -> None:
    now = clock.current_time()
    assert clock.deadline_to_sleep_time(now + 0.25) == pytest.approx(0.25)
    assert clock.deadline_to_sleep_time(now - 1) == pytest.approx(-1)


@pytest.mark.parametrize("waiting", [False, True])
def test_of_a_stall_a_second_counts(clock: LoopClock, hands: Hands, waiting: bool) -> None:
    began = clock.current_time()
    slept = clock.deadline_to_sleep_time(began + 30) if waiting else 0.0
    hands.seconds += 3600
    assert clock.current_time() - began == pytest.approx(slept + STALL_SECONDS)
    # It goes on from there, and the next deadline is as far away as it was.
    hands.seconds += 0.5
    assert clock.current_time() - began == pytest.approx(slept + STALL_SECONDS + 0.5)
    # Whatever stands still again and again: it never stops.
    for _ in range(10):
        hands.seconds += 60
        clock.current_time()
    assert clock.current_time() - began == pytest.approx(slept + 11 * STALL_SECONDS + 0.5)


def test_trio_runs_by_it(hands: Hands) -> None:
    async def main() -> float:
        began = trio.current_time()
        hands.seconds += 3 * STALL_SECONDS
        return trio.current_time() - began

    assert trio.run(main, clock=LoopClock(hands)) == pytest.approx(STALL_SECONDS)


def test_a_mount_that_was_stopped_for_longer_than_a_deadline_gives_its_readers_their_bytes(tmp_path: Path) -> None:
    with (
        nbdkit("memory", f"{MIB}", tcp=True) as server,
        mounted_over(tmp_path, server.url, "--no-stream", "--source-timeout", "4s") as mount,
    ):
        got: list[bytes | OSError] = []

        def read() -> None:
            try:
                # Past the page cache: of a read-ahead that has failed, the kernel asks for a page again.
                got.append(read_direct(mount.path("disk.raw"), 0, 4096))
            except OSError as exc:
                got.append(exc)

        reader = threading.Thread(target=read)
        os.kill(server.pid, signal.SIGSTOP)
        reader.start()
        wait_for(lambda: sum(source["readers"] for source in mount.status()["sources"]) == 1, "the reader")
        os.kill(mount.pid, signal.SIGSTOP)
        time.sleep(4.2)
        os.kill(server.pid, signal.SIGCONT)
        os.kill(mount.pid, signal.SIGCONT)
        reader.join(HANG_SECONDS)
        assert got == [bytes(4096)]
