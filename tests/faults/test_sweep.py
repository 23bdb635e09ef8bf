"""Faults at system calls of a real mount: what returned is there, what did not may be, the rest is the backing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.inject import ACTIONS
from tests.faults.session import Expectation, Wrong
from tests.faults.sweep import Bench, Fault
from tests.harness.require import require_fuse, require_root

EVERY = 31  # contrib/sweep puts every fault at every call


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    require_fuse()
    require_root()
    with contextlib.closing(Bench(tmp_path)) as bench:
        yield bench


def test_some_calls(bench: Bench) -> None:
    """The actions take turns, so that each of them meets all parts of the session in time."""
    number, hits, killed, failed = 5, 0, 0, 0
    while (result := bench.run(Fault(number, ACTIONS[number % len(ACTIONS)]))).hit:
        hits += 1
        killed += result.killed
        failed += bool(result.failed)
        number += EVERY
    assert hits >= 4
    assert killed >= 2
    assert failed >= killed


def test_from_outside(bench: Bench) -> None:
    """By strace: the mount knows nothing of it."""
    result = bench.run(Fault(4, "kill", "pwritev2"))
    assert result.killed
    assert result.failed


def test_the_expectation_notices() -> None:
    """A byte is wrong if no version of its write explains it; versions may mix, as in a torn write."""
    expectation = Expectation(b"old" * 1000)
    expectation.wrote(0, b"new")
    expectation.may_have_written(600, b"xyz")
    good = bytearray(b"new" + b"old" * 999)
    expectation.judge(0, bytes(good))
    good[601:602] = b"y"
    expectation.judge(0, bytes(good))
    for pos, byte in ((0, b"o"), (601, b"x"), (2999, b"?")):
        bad = bytearray(good)
        bad[pos : pos + 1] = byte
        with pytest.raises(Wrong, match=f"byte {pos} "):
            expectation.judge(0, bytes(bad))


def test_the_expectation_after_a_failed_barrier() -> None:
    """What the last fsync had made durable, or what came later; a third thing is wrong."""
    expectation = Expectation(b"old" * 1000)
    expectation.wrote(0, b"1st")
    expectation.synced()
    expectation.wrote(0, b"2nd")
    expectation.barrier_failed()
    expectation.judge(0, b"1st")
    expectation.judge(0, b"2nd")
    with pytest.raises(Wrong, match="byte 0 "):
        expectation.judge(0, b"old")
