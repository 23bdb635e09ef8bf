"""What a holder decides, without a process and without a mount. With real ones: `test_holder.py`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from qedfs.control.monitoring.metrics import RESTART_REASONS
from qedfs.mount import holder
from qedfs.mount.holder import (
    AGAIN_SECONDS,
    DEATH_SECONDS,
    HANG_SECONDS,
    LINGER_SECONDS,
    LOAD_SECONDS,
    LOOK_SECONDS,
    Holder,
)
from qedfs.mount.holder_machine import Server
from tests.fakes.holder_machine import FakeMachine

DEATHS = 5


class Held:
    """A holder on a machine that is none. `now`: the server that has the mount, or gets it next."""

    def __init__(self, machine: FakeMachine, *, resend: bool = True, watchdog_seconds: float | None = None) -> None:
        self.machine = machine
        self.holder = Holder(machine, machine.adopt(), "/mnt", most_deaths=DEATHS, watchdog_seconds=watchdog_seconds)
        self.resend = resend
        self.mount_fd = os.memfd_create("the mount")

    @property
    def last(self) -> Server:
        return self.machine.servers[-1]

    def says(self, server: Server, *messages: str) -> None:
        for message in messages:
            verb, _, rest = message.partition(" ")
            self.holder.heard(server, verb, rest, None)

    def mount(self) -> Server:
        """The first server makes the mount and serves."""
        self.says(self.last, "ready")
        self.says(self.last, "set device 0:57", "set a b c", *(["set resend yes"] if self.resend else []))
        self.holder.heard(self.last, "keep", "", os.dup(self.mount_fd))
        self.says(self.last, "serving")
        self.machine.done.clear()
        return self.last

    def dies(self, server: Server, code: int = -signal.SIGKILL) -> None:
        self.holder.ended(server, code)

    def takes_over(self) -> Server:
        """The next server is ready and serves."""
        self.says(self.last, "ready", "serving")
        return self.last


@pytest.fixture
def held() -> Iterator[Held]:
    with_machine = Held(FakeMachine())
    yield with_machine
    os.close(with_machine.mount_fd)
    if with_machine.holder._kept >= 0:
        os.close(with_machine.holder._kept)


def test_the_first_server_makes_the_mount(held: Held) -> None:
    held.says(held.last, "ready")
    assert held.machine.done == ["1: mount"]
    held.says(held.last, "over")
    held.dies(held.last, 0)
    assert held.holder.run() == 0


def test_a_server_that_fails_before_it_mounts_ends_all_with_its_code(held: Held) -> None:
    held.says(held.last, "failed disk.qed: not a QED image")
    held.dies(held.last, 3)
    assert (held.holder.run(), held.machine.done) == (3, [])


@pytest.mark.parametrize(
    ("code", "said", "kind", "reason"),
    [
        (-signal.SIGKILL, "", "killed", "SIGKILL"),
        (-60, "", "killed", "signal 60"),
        (1, "internal error: KeyError: 5", "error", "exit code 1 (internal error: KeyError: 5)"),
        (0, "", "error", "exit code 0"),
    ],
)
def test_any_end_that_was_not_announced_is_a_crash(held: Held, code: int, said: str, kind: str, reason: str) -> None:
    server = held.mount()
    held.says(server, *([f"failed {said}"] if said else []))
    held.machine.clock += 7
    held.dies(server, code)
    assert held.machine.done == ["start 2"]
    held.takes_over()
    told, values = held.machine.passed[0]
    assert told == {"reason": reason, "restarts": 1, "kinds": {kind: 1}, "since": 1007.0}
    assert values["a"] == "b c"
    assert f"was ended by {reason}; another one takes over" in held.machine.logged[0]
    assert held.holder.result is None


def test_the_labels_of_the_metric_are_these_kinds() -> None:
    assert set(RESTART_REASONS) == {holder.UPGRADE, holder.KILLED, holder.ERROR, holder.HUNG}


def test_as_many_crashes_within_a_minute_end_the_mount(held: Held) -> None:
    server = held.mount()
    for _ in range(DEATHS - 1):
        held.dies(server)
        server = held.takes_over()
    held.dies(server)
    assert held.holder.result == 1
    assert held.machine.done[-1] == "take away 0:57"
    assert (
        f"/mnt: its server has died {DEATHS} times within a minute, the last time by SIGKILL" in held.machine.logged[-1]
    )


def test_crashes_long_ago_do_not_count(held: Held) -> None:
    server = held.mount()
    for _ in range(3 * DEATHS):
        held.dies(server)
        server = held.takes_over()
        held.machine.clock += DEATH_SECONDS / (DEATHS - 2)
    assert held.holder.result is None


def test_the_pause_is_counted_from_the_last_server_that_served(held: Held) -> None:
    held.dies(held.mount())
    for _ in range(2):
        held.machine.clock += 5
        held.dies(held.last)
    held.takes_over()
    assert held.machine.passed[-1][0]["since"] == 1000.0


def test_a_kernel_that_does_not_repeat_requests_lets_a_crash_end_the_mount() -> None:
    held = Held(FakeMachine(), resend=False)
    held.dies(held.mount())
    assert held.holder.result == 1
    assert "this kernel does not repeat requests" in held.machine.logged[0]
    assert held.machine.done == ["take away 0:57"]


def test_an_upgrade_starts_the_next_server_before_the_old_one_ends(held: Held) -> None:
    old = held.mount()
    held.says(old, "upgrade")
    held.says(old, "upgrade")  # somebody else asks as well
    new = held.last
    held.says(new, "ready")
    assert held.machine.done == ["start 2", "1: hand"]
    held.says(old, "handed")
    held.dies(old, 0)
    assert held.machine.done[-1] == "2: take"
    assert held.machine.passed[0][0]["kinds"] == {"upgrade": 1}


@pytest.mark.parametrize("number", [signal.SIGUSR2])
def test_a_signal_asks_for_an_upgrade_as_well(held: Held, number: int) -> None:
    held.mount()
    held.holder.signalled(number)
    assert held.machine.done == ["start 2"]


def test_a_next_server_that_fails_is_told_to_the_old_one(held: Held) -> None:
    old = held.mount()
    held.says(old, "upgrade")
    held.says(held.last, "failed it is too new")
    held.dies(held.last, 1)
    assert held.machine.done[-1] == "1: failed it is too new"
    assert held.holder.result is None


def test_if_no_server_can_be_started_the_old_one_is_told(held: Held) -> None:
    old = held.mount()
    held.machine.starts = 1
    held.says(old, "upgrade")
    assert held.machine.done == ["1: failed Resource temporarily unavailable"]


def test_if_no_server_can_be_started_after_a_crash_the_mount_ends(held: Held) -> None:
    server = held.mount()
    held.machine.starts = 1
    held.dies(server)
    assert (held.holder.result, held.machine.done) == (1, ["take away 0:57"])
    assert "no other one can be started: Resource temporarily unavailable" in held.machine.logged[-1]


def test_a_crash_while_an_upgrade_loads_gives_the_mount_to_that_server(held: Held) -> None:
    old = held.mount()
    held.says(old, "upgrade")
    held.dies(old)
    held.says(held.last, "ready")
    assert held.machine.done == ["start 2", "2: take"]


def test_a_next_server_that_hangs_while_it_loads_is_replaced(held: Held) -> None:
    held.dies(held.mount())
    hanging = held.last
    held.machine.clock += LOAD_SECONDS - 1
    held.holder.look()
    assert held.machine.done == ["start 2"]
    held.machine.clock += 1
    held.holder.look()
    held.holder.look()
    assert held.machine.done[1:] == [f"kill 2 {signal.SIGKILL}"]
    held.dies(hanging)
    held.takes_over()
    assert held.machine.done[2:] == ["start 3", "3: take"]
    assert held.machine.passed[-1][0]["kinds"] == {"killed": 1, "hung": 1}


def test_a_server_that_hangs_before_it_serves_is_replaced(held: Held) -> None:
    held.dies(held.mount())
    hanging = held.last
    held.says(hanging, "ready", "alive")
    for _ in range(5):
        held.machine.clock += HANG_SECONDS
        held.holder.look()
        held.says(hanging, "alive")  # it opens many overlays of a slow disk
    held.machine.clock += HANG_SECONDS + 1
    held.holder.look()
    held.holder.look()
    assert held.machine.done == ["start 2", "2: take", f"kill 2 {signal.SIGKILL}"]
    held.dies(hanging)
    held.takes_over()
    assert held.machine.passed[-1][0]["kinds"] == {"killed": 1, "hung": 1}
    held.machine.clock += HANG_SECONDS + 1  # stopped by a user who looks at it
    held.holder.look()
    assert held.machine.done[3:] == ["start 3", "3: take"]


def test_servers_that_die_before_they_serve_end_the_mount_however_long_each_takes(held: Held) -> None:
    held.dies(held.mount())
    for _ in range(DEATHS - 2):
        held.machine.clock += 10 * DEATH_SECONDS
        held.dies(held.last)
    assert len(held.machine.servers) == DEATHS
    held.machine.clock += 10 * DEATH_SECONDS
    held.dies(held.last)
    assert held.holder.result == 1
    assert f"died {DEATHS} times without serving in between" in held.machine.logged[-1]


def test_an_upgrade_that_hangs_while_it_loads_leaves_the_old_server_serving(held: Held) -> None:
    held.says(held.mount(), "upgrade")
    held.machine.clock += LOAD_SECONDS
    held.holder.look()
    held.dies(held.last)
    assert held.machine.done[-1] == f"1: failed it has loaded for longer than {LOAD_SECONDS:.0f} s"


# Signals.


def test_a_signal_ends_the_mount_through_its_server(held: Held) -> None:
    server = held.mount()
    held.holder.signalled(signal.SIGTERM)
    assert held.machine.done == [f"kill 1 {signal.SIGTERM}"]
    held.says(server, "over")
    held.dies(server, 9)
    assert held.holder.result == 9


def test_a_signal_before_there_is_a_mount_ends_the_server_that_starts(held: Held) -> None:
    held.holder.signalled(signal.SIGINT)
    assert held.machine.done == [f"kill 1 {signal.SIGINT}"]
    held.dies(held.last, 130)
    assert held.holder.result == 130


def test_a_signal_while_nobody_serves_reaches_the_next_server_when_it_serves(held: Held) -> None:
    held.dies(held.mount())
    held.holder.signalled(signal.SIGTERM)
    assert held.machine.done == ["start 2"]
    held.takes_over()
    assert held.machine.done[1:] == ["2: take", f"kill 2 {signal.SIGTERM}"]


def test_a_signal_while_the_next_server_loads_ends_the_mount_without_it(held: Held) -> None:
    old = held.mount()
    held.says(old, "upgrade")
    held.holder.signalled(signal.SIGTERM)
    assert held.machine.done[1:] == [f"kill 2 {signal.SIGKILL}", f"kill 1 {signal.SIGTERM}"]
    held.says(held.last, "ready")  # sent before the signal
    held.dies(held.last)
    held.says(old, "over")
    held.dies(old, 0)
    assert held.holder.result == 0
    assert "1: hand" not in held.machine.done


def test_a_signal_during_the_hand_over_ends_the_mount_through_the_next_server(held: Held) -> None:
    old = held.mount()
    held.says(old, "upgrade")
    held.says(held.last, "ready")
    held.holder.signalled(signal.SIGTERM)
    assert held.machine.done == ["start 2", "1: hand"]
    held.says(old, "handed")
    held.dies(old, 0)
    held.says(held.last, "serving")
    assert held.machine.done[2:] == ["2: take", f"kill 2 {signal.SIGTERM}"]


def test_a_server_that_crashes_at_its_end_leaves_the_rest_of_it_to_the_next_one(held: Held) -> None:
    server = held.mount()
    held.holder.signalled(signal.SIGTERM)
    held.dies(server)
    new = held.takes_over()
    assert held.machine.done[1:] == ["start 2", "2: take", f"kill 2 {signal.SIGTERM}"]
    held.says(new, "over")
    held.dies(new, 0)
    assert held.holder.result == 0


def test_a_second_signal_ends_everything_at_once(held: Held) -> None:
    held.mount()
    held.holder.signalled(signal.SIGTERM)
    held.machine.clock += AGAIN_SECONDS
    held.holder.signalled(signal.SIGINT)
    assert held.machine.done[1:] == [f"kill 1 {signal.SIGKILL}", "take away 0:57"]
    held.dies(held.last)
    assert held.holder.result == -signal.SIGINT
    assert len(held.machine.servers) == 1  # no other one takes over from one that we have killed


def test_a_signal_that_comes_twice_is_one(held: Held) -> None:
    """timeout(1) signals its child, and then the group that this is in."""
    held.mount()
    held.holder.signalled(signal.SIGTERM)
    held.holder.signalled(signal.SIGTERM)
    assert held.machine.done == [f"kill 1 {signal.SIGTERM}"]


def test_the_question_what_it_is_doing_goes_to_the_server(held: Held) -> None:
    held.mount()
    held.holder.signalled(signal.SIGUSR1)
    assert held.machine.done == [f"kill 1 {signal.SIGUSR1}"]


# What does not happen in time.


@pytest.mark.parametrize(("waits_for", "ends"), [("mount", True), ("unknown", True), ("disk", False)])
def test_a_killed_server_may_wait_for_its_disk_but_not_for_the_mount(held: Held, waits_for: str, ends: bool) -> None:
    held.mount()
    held.machine.lingering = waits_for
    held.holder.look()
    held.machine.clock += min(LINGER_SECONDS[waits_for], 100_000) + 1
    held.holder.look()
    assert (held.holder.result is not None) is ends
    if not ends:
        assert "waits for a disk" in held.machine.logged[0]


def test_a_silent_server_is_replaced_before_the_service_manager_ends_the_service() -> None:
    held = Held(FakeMachine(), watchdog_seconds=20)
    server = held.mount()
    held.machine.clock += 14
    held.holder.look()
    assert held.machine.done == []
    held.says(server, "notify WATCHDOG=1")
    held.machine.clock += 16
    held.holder.look()
    assert held.machine.done == ["notify WATCHDOG=1", f"kill 1 {signal.SIGKILL}", "notify WATCHDOG=1"]
    held.dies(server)
    held.machine.clock += 50  # a server may need long to take over; the manager hears from us
    held.holder.look()
    assert held.machine.done[3:] == ["start 2", "notify WATCHDOG=1"]
    held.takes_over()
    assert held.machine.passed[0][0]["kinds"] == {"hung": 1}


def test_it_looks_after_its_servers_all_the_time(held: Held) -> None:
    server = held.mount()
    held.machine.events.append(lambda listener: listener.heard(server, "del", "a", None))
    held.machine.events.append(lambda listener: listener.heard(server, "over", "", None))
    held.machine.events.append(lambda listener: listener.ended(server, 0))
    assert held.holder.run() == 0
    assert "a" not in held.holder._values
    assert LOOK_SECONDS > 0


def test_a_descriptor_that_nobody_wants_is_closed(held: Held) -> None:
    server = held.mount()
    fd = os.memfd_create("more")
    held.holder.heard(server, "set", "b c", fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_next_server_is_told_of_the_format_that_the_last_one_has_set(held: Held) -> None:
    server = held.mount()
    held.says(server, "set format 2")
    held.dies(server)
    assert held.machine.state == "2"
