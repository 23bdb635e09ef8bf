"""On which file system a file is, as the kernel says without asking that file system."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from qedfs.host.device import device_of
from qedfs.overlay.create import create_overlay
from tests.harness.mounts import mounted
from tests.mount.support import opened


def test_the_device_is_that_of_stat(tmp_path: Path) -> None:
    found = tmp_path.stat().st_dev
    with (tmp_path / "file").open("wb") as file:
        assert device_of(f"/proc/self/fd/{file.fileno()}") == f"{os.major(found)}:{os.minor(found)}"
    assert device_of("/proc/self/fd/0") != device_of(str(tmp_path))
    assert device_of(str(tmp_path / "missing")) == ""


def test_a_file_system_that_hangs_is_not_asked(tmp_path: Path) -> None:
    create_overlay(str(tmp_path / "disk.qed"), image_size=1 << 20, backing=None)
    with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount, opened(mount.path("disk.raw")) as fd:
        found = (tmp_path / "mnt").stat().st_dev
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            assert device_of(f"/proc/self/fd/{fd}") == f"{os.major(found)}:{os.minor(found)}"
        finally:
            os.kill(mount.pid, signal.SIGCONT)
