"""Processes that share work: each part is done once, and nobody is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.host.shared_work import share_out

# pytest-xdist has a thread, for which Python 3.12 warns of a fork.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    descriptors = os.listdir("/proc/self/fd")
    before = children()
    yield
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def children() -> str:
    """Their process ids. Those that the tests have in common stay."""
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


def all_of(numbers: Iterator[int]) -> bytes:
    return bytes(numbers)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_each_part_is_done_once(processes: int) -> None:
    found = share_out(range(3, 256), processes, all_of)
    assert found is not None
    assert len(found) == processes
    assert sorted(b"".join(found)) == list(range(3, 256))


def test_they_are_waited_for_although_the_program_was_started_to_ignore_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        found = share_out(range(9), 3, all_of)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert sorted(b"".join(found or [])) == list(range(9))


def test_results_may_be_long() -> None:
    found = share_out(range(2), 2, lambda numbers: bytes(3 << 20) + bytes(numbers))
    assert found is not None
    assert sum(map(len, found)) == (6 << 20) + 2


@pytest.mark.parametrize("way", ["raises", "is killed", "exits"])
def test_another_process_that_fails_is_noticed(way: str) -> None:
    here = os.getpid()

    def work(numbers: Iterator[int]) -> bytes:
        if os.getpid() != here:
            if way == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif way == "exits":
                raise SystemExit(0)
            raise ValueError(way)
        return bytes(numbers)

    assert share_out(range(9), 2, work) is None


def test_an_error_here_ends_the_others() -> None:
    here = os.getpid()

    def work(numbers: Iterator[int]) -> bytes:
        if os.getpid() == here:
            raise KeyboardInterrupt
        time.sleep(3600)
        return bytes(numbers)

    with pytest.raises(KeyboardInterrupt):
        share_out(range(9), 3, work)


def test_the_rest_is_done_here_if_there_can_be_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError

    monkeypatch.setattr("os.fork", no_fork)
    assert share_out(range(9), 2, all_of) == [bytes(range(9))]


def test_no_more_is_done_for_a_process_that_has_been_killed() -> None:
    reader, writer = os.pipe()
    if not (killed := os.fork()):
        here = os.getpid()

        def work(numbers: Iterator[int]) -> bytes:
            if os.getpid() == here:
                time.sleep(3600)
            os.kill(here, signal.SIGKILL)
            while os.getppid() == here:
                pass
            for number in numbers:
                os.write(writer, b"%d" % number)
            return b""

        share_out(range(9), 2, work)
    os.close(writer)
    assert os.waitpid(killed, 0)[1] == signal.SIGKILL
    assert os.read(reader, 9) == b""
    os.close(reader)
