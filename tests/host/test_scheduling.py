"""The slice of the scheduler that a mount asks for."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from multiprocessing import get_context

import pytest

from qedfs.host import scheduling

from ..harness.require import unavailable

_GET = {"x86_64": 315, "aarch64": 275}  # sched_getattr


def asked(how: str) -> tuple[bool, int, int]:
    """Ask in this process: (the answer, nice and slice of a thread that starts afterwards)."""
    if how == "nice":
        os.nice(7)
    if how == "batch":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    answer = scheduling.ask_for_short_slices()
    found: list[tuple[int, int]] = []

    def look() -> None:
        attributes = ctypes.create_string_buffer(scheduling._ATTRIBUTES.size)
        number = ctypes.c_long(_GET[os.uname().machine])
        size = ctypes.c_uint(scheduling._ATTRIBUTES.size)
        assert not ctypes.CDLL(None).syscall(number, ctypes.c_long(0), attributes, size, ctypes.c_uint(0))
        _, _, _, nice, _, slice_ns, _, _ = struct.unpack(scheduling._ATTRIBUTES.format, attributes.raw)
        found.append((nice, slice_ns))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return (answer, *found[0])


def in_a_process(how: str) -> tuple[bool, int, int]:
    """Not in this one, whose threads are those of the tests."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(asked, (how,))


def test_threads_get_the_slice_and_keep_their_nice_value() -> None:
    if os.uname().machine not in _GET:
        unavailable("the numbers of the calls are known for two architectures")
    answer, nice, slice_ns = in_a_process("nice")
    assert (answer, nice) == (True, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12):
        assert slice_ns == scheduling.SLICE_NS


def test_the_choice_of_a_user_is_left_alone() -> None:
    answer, _, slice_ns = in_a_process("batch")
    assert not answer
    assert slice_ns != scheduling.SLICE_NS


def test_an_unknown_architecture_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert not scheduling.ask_for_short_slices()
