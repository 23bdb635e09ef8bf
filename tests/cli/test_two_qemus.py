"""The memory of a guest moves between two QEMUs: real ones, whose guest is only their firmware, and two fakes.

What both must do is said once, for both. A fake may be told to fail in ways that a real one cannot be made to.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import pytest

from qedfs.cli.migration import two_qemus
from qedfs.cli.migration.two_qemus import Lost, TwoQemus
from qedfs.control.qmp import client
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import QedfsError, TimedOut, UsageError
from tests.fakes.qemu import FakePair, FakeQemu
from tests.harness.migration.bare import Bare, bare

Make = Callable[..., contextlib.AbstractContextManager["Pair[Any]"]]
Q = TypeVar("Q", Bare, FakeQemu)


def _ignore(_: object) -> None:
    pass


class Pair(Generic[Q]):
    """Two QEMUs and the migration between them."""

    def __init__(self, source: Q, destination: Q, qemus: TwoQemus) -> None:
        self.source: Q = source
        self.destination: Q = destination
        self.qemus = qemus

    def stop(self) -> None:
        """Up to the moment at which the guest stands still."""
        self.qemus.check()
        self.qemus.prepare()
        self.qemus.start()
        self.qemus.wait_stopped(math.inf, _ignore)

    def runs(self) -> tuple[bool, bool]:
        """Whether the guest runs at the source, and at the destination."""
        here, there = (qemu.execute("query-status") for qemu in (self.qemus.source, self.qemus.destination))
        return here["running"], there["running"]


@contextlib.contextmanager
def fakes(*, post_copy: bool = False) -> Iterator[Pair[FakeQemu]]:
    made = FakePair()
    qemus = TwoQemus(made.source, made.destination, "unix:/run/incoming", post_copy=post_copy)
    yield Pair(made.source, made.destination, qemus)


@contextlib.contextmanager
def pair(*, post_copy: bool = False, incoming: str = "defer") -> Iterator[Pair[Bare]]:
    with (
        bare() as source,
        bare(incoming=incoming) as destination,
        QemuClient.at(source.monitor) as here,
        QemuClient.at(destination.monitor) as there,
    ):
        yield Pair(source, destination, TwoQemus(here, there, destination.incoming, post_copy=post_copy))


@pytest.mark.parametrize("make", [pair, fakes])
@pytest.mark.parametrize("post_copy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_guest_moves_and_its_old_qemu_ends(make: Make, post_copy: bool) -> None:
    with make(post_copy=post_copy) as both:
        both.stop()
        assert both.runs() == (False, False)
        both.qemus.go_on()
        assert both.runs() == (False, True)
        assert both.qemus.resumed_at >= both.qemus.stopped_at > 0
        both.qemus.wait_completed(_ignore)
        both.qemus.quit_source()
        assert both.source.wait() == 0


@pytest.mark.parametrize("post_copy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_guest_that_stands_still_runs_on_at_the_source(post_copy: bool) -> None:
    with pair(post_copy=post_copy) as both:
        both.stop()
        both.qemus.cancel()
        assert both.qemus.source.execute("query-status")["running"]
        with bare(incoming="defer") as third, QemuClient.at(third.monitor) as there:
            again = Pair(both.source, third, TwoQemus(both.qemus.source, there, third.incoming, post_copy=post_copy))
            again.stop()
            again.qemus.go_on()
            assert again.runs() == (False, True)


def test_a_destination_that_listens_already() -> None:
    with bare() as source, QemuClient.at(source.monitor) as here:
        uri = f"unix:{source.monitor}-incoming"
        with bare(incoming=uri) as destination, QemuClient.at(destination.monitor) as there:
            both = Pair(source, destination, TwoQemus(here, there, uri, post_copy=False))
            both.stop()
            both.qemus.go_on()
            assert both.runs() == (False, True)


@pytest.mark.parametrize("make", [pair, fakes])
def test_nobody_listens_where_the_memory_goes(make: Make) -> None:
    with make() as both:
        both.qemus.prepare()
        both.qemus = TwoQemus(both.qemus.source, both.qemus.destination, "unix:/nowhere/at-all", post_copy=False)
        both.qemus.start()
        with pytest.raises(QedfsError, match=r"has failed before the guest was stopped.*No such file"):
            both.qemus.wait_stopped(math.inf, _ignore)
        both.qemus.cancel()
        assert both.runs() == (True, False)


@pytest.mark.parametrize("make", [pair, fakes])
def test_a_destination_that_dies_before_the_guest_stands_still(make: Make) -> None:
    with make() as both:
        both.qemus.source.execute("migrate-set-parameters", max_bandwidth=4096)
        both.qemus.prepare()
        both.qemus.start()
        both.destination.kill()
        with pytest.raises(QedfsError, match="the migration has failed before the guest was stopped"):
            both.qemus.wait_stopped(math.inf, _ignore)
        both.qemus.cancel()
        assert both.qemus.source.execute("query-status")["running"]


@pytest.mark.parametrize("make", [pair, fakes])
def test_a_destination_that_dies_in_the_last_step_leaves_the_guest_at_the_source(make: Make) -> None:
    with make() as both:
        both.stop()
        both.destination.kill()
        with pytest.raises(Lost):
            both.qemus.go_on()
        assert both.qemus.end_destination()
        both.qemus.cancel()
        assert both.qemus.source.execute("query-status")["running"]


def test_a_connection_that_breaks_in_the_last_step_does_not_prove_that_the_destination_has_ended() -> None:
    with pair() as both:
        both.stop()
        both.qemus.destination._socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(Lost):
            both.qemus.go_on()
        assert not both.qemus.end_destination()
        with QemuClient.at(both.destination.second_monitor) as again:
            assert again.execute("query-status")["status"] in ("inmigrate", "running")


def test_a_qemu_that_gives_no_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWITCH_SECONDS", "CANCEL_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(two_qemus, name, 0.5)
    monkeypatch.setattr(client, "ANSWER_SECONDS", 60.0)
    with pair() as both:
        both.stop()
        os.kill(both.source.pid, signal.SIGSTOP)
        with pytest.raises(TimedOut, match="has given no answer for 1 s"):
            both.qemus.cancel()
        with pytest.raises(Lost, match="has given no answer for 1 s"):
            both.qemus.go_on()
        with pytest.raises(TimedOut, match="has given no answer for 1 s"):
            both.qemus.has_failed()
        os.kill(both.destination.pid, signal.SIGSTOP)
        assert not both.qemus.end_destination()


def test_a_source_that_gives_no_answer_while_the_memory_moves() -> None:
    with pair() as both:
        both.qemus.prepare()
        both.qemus.start()
        os.kill(both.source.pid, signal.SIGSTOP)
        with pytest.raises(TimedOut):
            both.qemus.wait_stopped(0, _ignore)


@pytest.mark.parametrize("make", [pair, fakes])
def test_a_guest_that_runs_is_not_ended_at_the_destination(make: Make) -> None:
    with make() as both:
        both.stop()
        both.qemus.go_on()
        assert not both.qemus.end_destination()
        assert both.runs() == (False, True)


@pytest.mark.parametrize("make", [pair, fakes])
def test_memory_that_takes_too_long(make: Make) -> None:
    with make() as both:
        both.qemus.source.execute("migrate-set-parameters", max_bandwidth=4096)
        both.qemus.prepare()
        both.qemus.start()
        with pytest.raises(TimedOut):
            both.qemus.wait_stopped(0, _ignore)
        both.qemus.cancel()
        assert both.qemus.source.execute("query-status")["running"]


@pytest.mark.parametrize("make", [pair, fakes])
def test_what_cannot_migrate(make: Make) -> None:
    with make() as both:
        both.qemus.source.execute("stop")
        with pytest.raises(UsageError, match="its guest does not run"):
            both.qemus.check()
        both.qemus.source.execute("cont")
        both.qemus.check()
        backwards = TwoQemus(both.qemus.source, both.qemus.source, "unix:/run/x", post_copy=False)
        with pytest.raises(UsageError, match="waits for no migration"):
            backwards.check()
        both.qemus.source.execute("migrate-set-parameters", max_bandwidth=4096)
        both.qemus.prepare()
        both.qemus.start()
        with pytest.raises(UsageError, match="migrates already"):
            both.qemus.check()


def test_a_fake_that_listens_already_is_not_told_to() -> None:
    made = FakePair(listens="unix:/run/incoming")
    both = Pair(
        made.source, made.destination, TwoQemus(made.source, made.destination, "unix:/run/incoming", post_copy=False)
    )
    both.stop()
    both.qemus.go_on()
    assert both.runs() == (False, True)


def test_another_refusal_to_listen_is_not_passed_over() -> None:
    with fakes() as both:
        both.qemus.destination.deadline = 0
        both.destination.hangs = True
        with pytest.raises(TimedOut):
            both.qemus.prepare()


def test_a_fake_that_gives_no_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes() as both:
        both.stop()
        both.source.hangs = both.destination.hangs = True
        with pytest.raises(TimedOut, match="has given no answer"):
            both.qemus.cancel()
        with pytest.raises(Lost, match="has given no answer"):
            both.qemus.go_on()
        with pytest.raises(TimedOut, match="has given no answer"):
            both.qemus.has_failed()
        assert not both.qemus.end_destination()
        both.destination.hangs = False
        both.destination.cut = True  # which does not prove that it has ended
        assert not both.qemus.end_destination()


def test_a_migration_that_fails_in_its_last_step_lets_the_guest_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes() as both:
        both.stop()
        made = both.destination._pair
        made.in_last_step = both.destination.kill
        with pytest.raises(Lost):
            both.qemus.go_on()
        assert both.qemus.has_failed()
        assert both.qemus.end_destination()
        assert both.qemus.source.execute("query-status")["running"]


def test_a_guest_that_the_destination_does_not_start() -> None:
    with fakes() as both:
        both.destination._pair.stays_paused = True
        both.stop()
        with pytest.raises(Lost, match=r"has the guest, but did not start it \(paused\)"):
            both.qemus.go_on()
        assert not both.qemus.has_failed()
        assert both.qemus.end_destination()
        assert not both.destination.lives


@pytest.mark.parametrize("state", ["failed", "postcopy-paused"])
def test_post_copy_that_stands_still_says_how_to_go_on(state: str) -> None:
    with fakes(post_copy=True) as both:
        both.stop()
        both.qemus.go_on()
        both.source._pair.state = state
        with pytest.raises(QedfsError, match=f"the migration is {state}; QMP's migrate-recover"):
            both.qemus.wait_completed(_ignore)


def test_a_guest_whose_destination_ends_before_all_of_its_memory_is_there_is_lost() -> None:
    with fakes(post_copy=True) as both:
        both.stop()
        both.qemus.go_on()
        both.destination.kill()
        with pytest.raises(Lost, match="so the guest is lost as in a power cut"):
            both.qemus.wait_completed(_ignore)
        with pytest.raises(QedfsError, match="Migration is not finalized yet"):
            both.qemus.source.execute("cont")  # QEMU itself sees to it that it does not run on from here


def test_a_destination_that_never_starts_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_qemus, "SWITCH_SECONDS", 0.0)
    with fakes() as both:
        both.stop()
        monkeypatch.setattr(both.source._pair, "_migrate_continue", lambda qemu, state: None)
        with pytest.raises(Lost, match="does not run after 0 s"):
            both.qemus.go_on()
