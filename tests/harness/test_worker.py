"""A worker of pytest-xdist keeps no hold of what is mounted outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.harness.images import qemu_create
from tests.harness.mounts import mounted
from tests.harness.require import require_root

ROOT = Path(__file__).parents[2]
SEPARATE = "from tests.harness import worker; worker.separate(); print(open('/proc/self/mountinfo').read())"


def test_it_has_no_copies_of_mounts(tmp_path: Path) -> None:
    require_root()
    qemu_create(tmp_path / "disk.qed", size=1 << 20)
    with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
        here = Path("/proc/self/mountinfo").read_text()
        command = [sys.executable, "-c", SEPARATE]
        there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f" {mount.mountpoint} " in here
        assert " / " in there
        assert f" {mount.mountpoint} " not in there
        assert mount.unmount() == 0
