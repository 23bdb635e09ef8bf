"""What becomes of writes to an image in standby: refused, held, or the reason to activate it."""

from __future__ import annotations

import errno

import pytest
import trio

from qedfs.errors import InStandby, SourceUnreachable
from qedfs.image.write_gate import WriteGate, Writes


async def test_a_write_is_refused_as_on_a_read_only_disk() -> None:
    gate = WriteGate("disk.raw", Writes.REFUSE)
    with pytest.raises(InStandby, match="qedfs activate") as caught:
        await gate.passed()
    assert caught.value.errno == errno.EROFS


async def test_a_held_write_goes_on_when_the_gate_opens(autojump_clock: trio.testing.MockClock) -> None:
    gate, went = WriteGate("disk.raw", Writes.HOLD), []

    async def write() -> None:
        await gate.passed()
        went.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(write)
        await trio.sleep(1000)
        assert not went
        gate.open()
        opened = trio.current_time()
    assert went == [opened] * 3
    await gate.passed()


async def test_a_held_write_that_nobody_waits_for_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    gate = WriteGate("disk.raw", Writes.HOLD)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(SourceUnreachable, match="nobody waits"):
                await gate.passed()

        nursery.start_soon(write)
        await trio.sleep(1)
        assert gate.waiting.since == trio.current_time() - 1
        gate.waiting.give_up(since=trio.current_time())


async def test_a_held_write_fails_before_the_kernel_would_cut_the_mount_because_of_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate, began = WriteGate("disk.raw", Writes.HOLD, most_seconds=55), trio.current_time()
    with pytest.raises(InStandby, match="not activated within 55 s, the longest that the kernel lets a write wait"):
        await gate.passed()
    assert trio.current_time() - began == 55


async def test_a_write_that_activates_waits_for_the_activation_or_fails_with_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate, fails = WriteGate("disk.raw", Writes.ACTIVATE), True

    async def activate() -> None:
        await trio.sleep(1)
        if fails:
            raise SourceUnreachable("not there")
        gate.open()

    gate.activate = activate
    with pytest.raises(SourceUnreachable, match="not there"):
        await gate.passed()
    fails = False
    await gate.passed()


async def test_a_write_goes_on_before_the_activation_that_waits_for_it_has_ended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate, written = WriteGate("disk.raw", Writes.ACTIVATE), trio.Event()

    async def activate() -> None:
        gate.open()
        await written.wait()  # as the kernel, which locks the pages of a write until it is answered

    gate.activate = activate
    with trio.fail_after(1):
        await gate.passed()
    written.set()
