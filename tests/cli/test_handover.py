"""A migration with its disk, in which something goes wrong at a chosen moment: the guest runs on at the source.

What a guest writes meanwhile is looked at in `tests/mount/test_live_migration.py`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.cli.migration import moved_image
from qedfs.control.qmp import client
from qedfs.errors import QedfsError, SourceError, TimedOut

from .migrating import Scene, migrating


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with migrating(tmp_path) as made:
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
