"""A mount that fails while it begins leaves nothing behind, however far it has come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qedfs.mount.mountpoint import mount_info_at
from qedfs.overlay.create import create_overlay
from tests.harness.mounts import COMMAND_SECONDS
from tests.harness.require import require, require_fuse, require_root
from tests.harness.sample import sample

from .support import MIB
from .test_options import NOBODY, user

# Read by every Python that starts with it in its PYTHONPATH: what comes after the kernel has mounted goes wrong.
AFTER_INIT = """
import sys
if "mount" in sys.argv or "mount" in sys.orig_argv:
    import pyfuse3
    init = pyfuse3.init
    def failing(*args):
        init(*args)
        raise {error}
    pyfuse3.init = failing
"""
IN_THE_TABLE = """
import sys
if "mount" in sys.orig_argv:
    import qedfs.mount.fuse_session as fuse_session
    def failing(place):
        raise {error}
    fuse_session.mount_info_at = failing
"""


@pytest.mark.parametrize("way", [(), ("--daemon",)])
@pytest.mark.parametrize(
    "error",
    [pytest.param("MemoryError()", marks=pytest.mark.slow), "RuntimeError('from libfuse')", "KeyboardInterrupt()"],
)
def test_a_mount_that_fails_once_the_kernel_has_mounted_leaves_none(
    tmp_path: Path, error: str, way: tuple[str, ...]
) -> None:
    require_root()
    require_fuse()
    done = _mount_with(tmp_path, AFTER_INIT.format(error=error), *way)
    assert done.returncode in (1, 130)
    assert "Traceback" not in done.stderr
    assert mount_info_at(str(tmp_path / "mnt")) is None


@pytest.mark.parametrize("error", ["OSError(24, 'Too many open files')", "ValueError('garbled')", "IndexError()"])
def test_a_table_of_mounts_that_cannot_be_read_keeps_no_mount_from_its_end(tmp_path: Path, error: str) -> None:
    require_root()
    require_fuse()
    done = _mount_with(tmp_path, IN_THE_TABLE.format(error=error), "--until-streamed")
    assert done.returncode == 0, done
    assert "the table of mounts cannot be read" in done.stderr
    assert mount_info_at(str(tmp_path / "mnt")) is None


def test_a_mount_of_a_user_for_whom_no_descriptor_is_left_leaves_none(tmp_path: Path) -> None:
    """Whether we find that before the mount, or fusermount3 has mounted when we cannot take what it hands over."""
    failed = 0
    with user(NOBODY) as nobody:
        overlay, mountpoint = nobody.folder / "disk.qed", nobody.folder / "mnt"
        nobody.run("mkdir", mountpoint)
        nobody.qedfs("create", overlay, "--size", "1M")
        limits = range(8, 56, sample(12, whole=4))
        for limit in limits:
            python = nobody.python
            command = (python, "-m", "qedfs", "mount", overlay, mountpoint, "--until-streamed")
            done = nobody.run(require("prlimit"), f"--nofile={limit}", *command, check=False)
            failed += done.returncode != 0
            assert mount_info_at(str(mountpoint)) is None, (limit, done)
    assert 0 < failed < len(limits)


def _mount_with(folder: Path, site: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Mounts a complete overlay at `folder`/mnt, with this sitecustomize."""
    (folder / "site").mkdir()
    (folder / "mnt").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(site)
    overlay = folder / "disk.qed"
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}
    qedfs = [sys.executable, "-m", "qedfs"]
    create_overlay(str(overlay), image_size=MIB, backing=None)
    try:
        return subprocess.run(
            [*qedfs, "mount", str(overlay), str(folder / "mnt"), *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
    finally:
        if mount_info_at(str(folder / "mnt")) is not None:
            subprocess.run([require("umount"), "--lazy", folder / "mnt"], check=False)
            raise AssertionError("a mount is left behind")
