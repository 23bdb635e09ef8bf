"""What a mount could not make durable is told by `umount`, whoever runs it, and whoever has unmounted it before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from qedfs.control.qmp.client import Client
from qedfs.errors import NotMounted
from qedfs.overlay.create import create_overlay

from ..harness.hang import HANG_SECONDS
from ..harness.mounts import Mount, mounted, qedfs
from ..harness.process import Child, Command, wait_for
from ..harness.require import require, require_root
from ..mount.support import MIB
from ..mount.test_options import NOBODY, user
from .support import is_running

EIO = ("-e", "inject=fdatasync:error=EIO")

# Read by every Python that starts with it in its PYTHONPATH. From the moment when `armed` is there, the disk says with
# `begun` that it was asked for a barrier, and fails that when `end` is there. `umount` says at once that it waits.
HELD_DISK = """
import errno, os, sys, time
folder = {folder!r}
fdatasync = os.fdatasync
def held(fd):
    if not os.path.exists(folder + "/armed"):
        return fdatasync(fd)
    open(folder + "/begun", "w").close()
    while not os.path.exists(folder + "/end"):
        time.sleep(0.005)
    raise OSError(errno.EIO, "Input/output error")
os.fdatasync = held
if "umount" in sys.orig_argv:
    import qedfs.cli.plain.umount
    qedfs.cli.plain.umount.SILENCE_SECONDS = 0.0
"""


class HeldDisk:
    """A disk whose last barrier fails when the test says so, for programs with this environment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(HELD_DISK.format(folder=str(folder)))
        self.env = {"PYTHONPATH": str(folder)}

    def arm(self) -> None:
        (self._folder / "armed").touch()

    def is_asked(self) -> bool:
        return (self._folder / "begun").exists()

    def fail(self) -> None:
        (self._folder / "end").touch()


@contextlib.contextmanager
def traced(pid: int, log: Path, *inject: str) -> Iterator[None]:
    """What `inject` does to each fdatasync of a process, by strace, while the block lasts."""
    require_root()
    tracer = Child([require("strace"), "-f", "-p", str(pid), "-e", "trace=fdatasync", *inject], log)
    try:
        tracer.wait_until(lambda: "attached" in tracer.output(), "strace attached")
        yield
    finally:
        tracer.stop()


@contextlib.contextmanager
def written(tmp_path: Path, env: Mapping[str, str] | None = None) -> Iterator[Mount]:
    """A mount with a write that nobody has flushed."""
    create_overlay(str(tmp_path / "disk.qed"), image_size=MIB, backing=None)
    with mounted(tmp_path / "disk.qed", tmp_path / "mnt", env=env) as mount:
        with mount.path("disk.raw").open("r+b", buffering=0) as image:
            image.write(b"returned")
        yield mount


def test_root_hears_of_the_end_of_another_users_mount(tmp_path: Path) -> None:
    with user(NOBODY) as nobody:
        overlay, mountpoint = nobody.folder / "disk.qed", nobody.folder / "mnt"
        nobody.run("mkdir", mountpoint)
        nobody.qedfs("create", overlay, "--size", "1M")
        nobody.qedfs("mount", overlay, mountpoint, "--daemon")
        with Client.connect(str(mountpoint)) as client:
            pid = client.server_pid
        with traced(pid, tmp_path / "strace", *EIO):
            nobody.run("dd", "if=/dev/urandom", f"of={mountpoint}/disk.raw", "bs=64k", "count=1", "conv=notrunc")
            done = qedfs("umount", mountpoint, check=False)
        assert "may be lost" in done.stderr
        assert done.returncode == 1


@pytest.mark.parametrize("options", [(), ("--if-mounted",)])
def test_a_failed_flush_of_a_mount_that_another_program_unmounts(tmp_path: Path, options: tuple[str, ...]) -> None:
    require_root()
    disk = HeldDisk(tmp_path / "site")
    with written(tmp_path, disk.env) as mount:
        disk.arm()
        try:
            subprocess.run([require("umount"), mount.mountpoint], check=True)
            wait_for(disk.is_asked, "the last flush")
            umount = Command(["umount", mount.mountpoint, *options], tmp_path / "umount", env=disk.env)
            umount.wait_until(lambda: "waiting for its server to close the overlays" in umount.output(), "its wait")
        finally:
            disk.fail()
        assert umount.wait() == 1
        assert "may be lost" in umount.output()
        # A process that ends lets go of its lock, by which this is known, a moment before it is dead.
        wait_for(lambda: not is_running(mount.pid), "the end of the server")


def test_a_report_that_nobody_has_read(tmp_path: Path) -> None:
    with written(tmp_path) as mount:
        with traced(mount.pid, tmp_path / "strace", *EIO):
            subprocess.run([require("umount"), mount.mountpoint], check=True)
            assert mount.wait_exit() == 1
        done = qedfs("umount", "--if-mounted", mount.mountpoint, check=False)
        assert "may be lost" in done.stderr
        assert done.returncode == 1
        assert qedfs("umount", "--if-mounted", mount.mountpoint).stderr == ""


def test_a_server_that_is_killed_while_it_closes_the_overlays(tmp_path: Path) -> None:
    disk = HeldDisk(tmp_path / "site")
    with written(tmp_path, disk.env) as mount:
        disk.arm()
        umount = Command(["umount", mount.mountpoint], tmp_path / "umount")
        try:
            wait_for(disk.is_asked, "the last flush")
            assert not _is_served(mount.mountpoint)
            os.kill(mount.pid, signal.SIGKILL)
            assert umount.wait(HANG_SECONDS) == 1
            assert "its server has ended before it had closed the overlays" in umount.output()
        finally:
            umount.kill()
    # It is served again, and nothing is told twice.
    with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
        assert mount.path("disk.raw").read_bytes().startswith(b"returned")
        assert qedfs("umount", mount.mountpoint).stderr == ""


def _is_served(mountpoint: Path) -> bool:
    try:
        Client.reach(str(mountpoint)).close()
    except NotMounted:
        return False
    return True
