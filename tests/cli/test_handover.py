"""A migration with its disk, in which something goes wrong at a chosen moment: the guest runs on at the source.

What a guest writes meanwhile is looked at in `tests/mount/test_live_migration.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qedfs.cli.migration import moved_image
from qedfs.cli.migration.handover import _undisturbed
from qedfs.cli.migration.moved_image import MovedImage
from qedfs.cli.migration.two_qemus import Lost, TwoQemus
from qedfs.control.qmp import client
from qedfs.errors import QedfsError, SourceError, TimedOut
from tests.harness.images import first_difference
from tests.harness.migration.bare import bare
from tests.harness.mounts import qedfs

from .migrating import SIZE, Scene, drive, migrating


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    # Slow enough that the image is not complete when the way back is taken.
    with migrating(tmp_path, SIZE, "--limit", "256K") as made:
        yield made


def test_a_server_that_is_gone_at_the_cut_over(scene: Scene) -> None:
    with scene.handover() as (handover, move):
        assert handover.outcome.export_pid is not None
        os.kill(handover.outcome.export_pid, signal.SIGKILL)
        with pytest.raises(SourceError):
            move()
        assert scene.source_runs()
    assert scene.state() == "standby"


def test_a_mount_that_gives_no_answer_at_the_cut_over(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved_image, "WAY_BACK_SECONDS", 0.1)
    monkeypatch.setattr(client, "CONNECT_SECONDS", 4.0)
    with scene.handover() as (_, move):
        os.kill(scene.mount.pid, signal.SIGSTOP)
        try:
            with pytest.raises(TimedOut):
                move()
            assert scene.source_runs()
        finally:
            os.kill(scene.mount.pid, signal.SIGCONT)


def test_a_mount_that_dies_before_the_cut_over(scene: Scene) -> None:
    with scene.handover() as (_, move):
        scene.mount.kill()
        with pytest.raises(QedfsError, match="the mount has ended"):
            move()
        assert scene.source_runs()


def _after_the_cut_over(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Something happens when the image is active, and the guest stands still."""
    cut_over = MovedImage.cut_over

    def then(image: MovedImage) -> None:
        cut_over(image)
        happens()

    monkeypatch.setattr(MovedImage, "cut_over", then)


def test_a_destination_that_dies_in_the_last_step_and_another_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _after_the_cut_over(patched, scene.destination.kill)
        with scene.handover() as (handover, move):
            with pytest.raises(Lost):
                move()
            assert handover.outcome.guest == "source"
            assert scene.source_runs()
    assert scene.state() == "standby"
    with bare(*drive(scene.mount.path("disk.raw")), incoming="defer") as scene.destination:
        qedfs("stream", "limit", scene.mount.mountpoint, "disk", "0")
        code, _, remarks = scene.migrate()
        assert code == 0, remarks
    assert first_difference(scene.mount.path("disk.raw"), scene.disk) is None


def test_a_destination_that_does_not_start_the_guest_gives_it_back(scene: Scene) -> None:
    with bare(*drive(scene.mount.path("disk.raw")), "-S", incoming="defer") as scene.destination:
        with scene.handover() as (handover, move):
            with pytest.raises(Lost, match=r"has the guest, but did not start it \(paused\)"):
                move()
            assert handover.outcome.guest == "source"
            assert scene.source_runs()
        assert scene.destination.wait() == 0
    assert scene.state() == "standby"


def test_a_guest_that_may_have_written_at_the_destination_does_not_run_on_at_the_source(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        with scene.mount.path("disk.raw").open("r+b") as file:
            file.write(b"guest")

    _after_the_cut_over(monkeypatch, write)
    there = bare(*drive(scene.mount.path("disk.raw")), "-S", incoming="defer")
    with there as scene.destination, scene.handover() as (handover, move):
        with pytest.raises(Lost):
            move()
        assert handover.outcome.guest == "stopped"
        assert not scene.source_runs()
        assert "since the image may have been written to" in capsys.readouterr().out


def test_a_cut_over_whose_answer_is_lost_is_taken_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose() -> None:
        raise TimedOut("no answer")

    _after_the_cut_over(monkeypatch, lose)
    with scene.handover() as (_, move):
        with pytest.raises(TimedOut):
            move()
        assert scene.source_runs()
    assert scene.state() == "standby"


def test_a_server_that_cannot_be_started_anew_at_the_cut_over(scene: Scene) -> None:
    def fail() -> None:
        raise QedfsError("the port is taken")

    with scene.handover() as (handover, _):
        handover._disk = dataclasses.replace(handover._disk, driver="qcow2")
        with pytest.raises(QedfsError, match="the port is taken"):
            handover.move(math.inf, lambda _: None, fail)
        assert scene.source_runs()
        assert handover.outcome.export_pid is None
    assert scene.state() == "standby"


def test_a_migration_that_has_failed_at_the_source_only(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoQemus, "has_failed", lambda _: True)
    with bare(*drive(scene.mount.path("disk.raw")), "-S", incoming="defer") as scene.destination:
        with scene.handover() as (handover, move):
            with pytest.raises(Lost):
                move()
            assert handover.outcome.guest == "source"
            assert scene.source_runs()
        assert scene.destination.wait() == 0
    assert scene.state() == "standby"


def test_a_signal_in_the_last_steps_is_heeded_after_them_and_not_blocked_for_programs_that_are_started() -> None:
    steps = []

    def interrupted() -> None:
        with _undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            blocked = subprocess.run(["grep", "SigBlk", "/proc/self/status"], capture_output=True, check=True).stdout
            steps.append(int(blocked.split()[1], 16) & 1 << signal.SIGTERM - 1)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
