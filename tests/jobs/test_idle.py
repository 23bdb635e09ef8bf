"""When the stream holds off and what it says: hours, delay, readers, pressure of the machine."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import trio

from qedfs.jobs.idle import GUEST_LOOK_SECONDS, Idle, Pressure
from qedfs.jobs.rules import Rules, parse_between, parse_delay
from qedfs.jobs.state import State
from qedfs.jobs.stream import StreamJob
from tests.fakes.source import FakeSource
from tests.served import CLUSTER, served

FIRST_LOOK = "measuring how busy the machine is"


class Machine:
    """Pressure files that a test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds = {"io": 0.0, "cpu": 0.0}
        self.own = 0.0
        self.wait(0, "io")
        self.wait(0, "cpu")

    def wait(self, seconds: float, kind: str) -> None:
        """Some task has waited."""
        self.seconds[kind] += seconds
        text = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={int(self.seconds[kind] * 1e6)}\nfull avg10=0 total=0\n"
        (self.folder / kind).write_text(text)

    def pressure(self) -> Pressure:
        return Pressure(lambda: self.own, folder=self.folder)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_without_rules_it_never_holds_off(machine: Machine, autojump_clock: trio.testing.MockClock) -> None:
    idle = Idle(Rules(), machine.pressure(), lambda: 0)
    machine.wait(5, "io")
    await trio.sleep(1)
    assert idle.reason() == ""


@pytest.mark.parametrize(("kind", "word"), [("io", "disk"), ("cpu", "processors")])
async def test_load_of_the_machine_holds_it_off_until_it_ends(
    machine: Machine, kind: str, word: str, autojump_clock: trio.testing.MockClock
) -> None:
    idle = Idle(Rules(quiet=True), machine.pressure(), lambda: 0)
    assert idle.reason() == FIRST_LOOK
    await trio.sleep(1)
    machine.wait(0.8, kind)
    assert word in idle.reason()
    assert "80%" in idle.reason()
    await trio.sleep(1)
    assert idle.reason() == ""


async def test_our_own_barriers_are_no_load(machine: Machine, autojump_clock: trio.testing.MockClock) -> None:
    idle = Idle(Rules(quiet=True), machine.pressure(), lambda: 0)
    assert idle.reason() == FIRST_LOOK
    await trio.sleep(1)
    machine.wait(0.6, "io")
    machine.own += 0.6
    assert idle.reason() == ""


async def test_a_kernel_without_pressure_figures_is_quiet(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    idle = Idle(Rules(quiet=True), Pressure(lambda: 0.0, folder=tmp_path / "none"), lambda: 0)
    idle.reason()
    await trio.sleep(1)
    assert idle.reason() == ""


async def test_a_look_of_long_ago_is_no_measurement(machine: Machine, autojump_clock: trio.testing.MockClock) -> None:
    idle = Idle(Rules(quiet=True), machine.pressure(), lambda: 0)
    idle.reason()
    await trio.sleep(3600)
    machine.wait(3, "io")
    assert idle.reason() == FIRST_LOOK
    await trio.sleep(1)
    assert idle.reason() == ""


async def test_a_reader_holds_it_off_for_the_grace_time(
    machine: Machine, autojump_clock: trio.testing.MockClock
) -> None:
    activity = 0
    idle = Idle(Rules(quiet=True), machine.pressure(), lambda: activity)
    idle.reason()
    await trio.sleep(1)
    assert idle.reason() == ""
    activity += 4096
    await trio.sleep(GUEST_LOOK_SECONDS)
    assert "reading" in idle.reason()
    await trio.sleep(1)
    assert "reading" in idle.reason()
    await trio.sleep(1.5)
    assert idle.reason() == ""


async def test_all_jobs_share_one_look_at_the_guests(machine: Machine, autojump_clock: trio.testing.MockClock) -> None:
    """A look costs a sum over all images; one for each job that asks would cost the square of their number."""
    looks = 0

    def activity() -> int:
        nonlocal looks
        looks += 1
        return 0

    idle = Idle(Rules(quiet=True), machine.pressure(), activity)
    for _ in range(100):
        for _ in range(25):
            idle.reason()
        await trio.sleep(0.01)
    assert looks <= 1 / GUEST_LOOK_SECONDS + 1


@pytest.mark.parametrize(
    ("window", "at", "inside"),
    [
        ("00:00-06:00", "03:00", True),
        ("00:00-06:00", "06:00", False),
        ("22:00-06:00", "23:30", True),
        ("22:00-06:00", "05:59", True),
        ("22:00-06:00", "12:00", False),
        ("22:00-24:00", "23:59", True),
    ],
)
async def test_hours(
    window: str, at: str, *, inside: bool, machine: Machine, autojump_clock: trio.testing.MockClock
) -> None:
    hour, minute = map(int, at.split(":"))
    clock = datetime.datetime(2026, 1, 1, hour, minute)
    idle = Idle(Rules(between=parse_between(window)), machine.pressure(), lambda: 0, clock=lambda: clock)
    assert bool(idle.reason()) is not inside


async def test_a_fleet_does_not_start_at_once(machine: Machine, autojump_clock: trio.testing.MockClock) -> None:
    fleet = [Idle(Rules(delay=parse_delay("30s-90s")), machine.pressure(), lambda: 0) for _ in range(50)]
    await trio.sleep(29)
    assert all("starts in" in idle.reason() for idle in fleet)
    await trio.sleep(31)
    running = sum(not idle.reason() for idle in fleet)
    assert 5 < running < 45
    await trio.sleep(31)
    assert not any(idle.reason() for idle in fleet)


async def test_the_job_waits_with_the_reason_and_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(b"x" * (20 * CLUSTER))
    reason = "the machine's disk is busy"
    async with served(source) as image, trio.open_nursery() as nursery:
        job = StreamJob(image, hold_off=lambda: reason)
        nursery.start_soon(job.run)
        await trio.sleep(5)
        assert (job.state, job.reason) == (State.WAITING, reason)
        assert source.bytes_read == 0
        reason = ""
        await trio.sleep(5)
        assert job.state is State.COMPLETE
