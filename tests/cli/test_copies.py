"""A mount of which another mount namespace has a copy, or another place, comes to an end, or the message is true."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.cli.mount_table import FILESYSTEM, copies
from qedfs.host import procfs
from qedfs.mount.mountpoint import MountInfo

from ..harness.hang import HANG_SECONDS
from ..harness.mounts import qedfs
from ..harness.process import Child, wait_for
from ..harness.require import require, require_root
from ..harness.starter import popen
from .support import daemon, in_mount_table, is_running, server_pid


@contextlib.contextmanager
def copied(tmp_path: Path, script: str = "sleep 600") -> Iterator[Child]:
    """A process in a mount namespace of its own, which has a private copy of all mounts; runs `script` there."""
    require_root()
    ready = tmp_path / "ready"
    command = [require("unshare"), "-m", "--propagation", "private", "sh", "-c", f': >"{ready}"; {script}; :']
    child = Child(command, tmp_path / "namespace.log")
    try:
        wait_for(ready.exists, "the namespace")
        yield child
    finally:
        _end_group(child)


def _end_group(child: Child) -> None:
    """The shell and what it has started: each Child has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.kill()


def test_a_copy_that_nobody_uses_ends_with_the_mount(
    overlay: Path, folder: Path, mountpoint: Path, tmp_path: Path
) -> None:
    with daemon(folder, mountpoint, "--restart"):
        pid = server_pid(mountpoint)
        with copied(tmp_path) as holder:
            done = qedfs("umount", mountpoint)
            assert f"pid {holder.pid} (sh) has a copy of it, which ends with the server" in done.stderr
            assert not is_running(pid)
            # And the overlay is free.
            qedfs("mount", overlay, mountpoint, "--daemon")
            qedfs("umount", mountpoint)


def test_an_image_that_is_open_in_a_copy_is_not_taken_away(
    overlay: Path, disk: Path, folder: Path, mountpoint: Path, tmp_path: Path
) -> None:
    with daemon(folder, mountpoint, "--no-stream", "--restart"):
        pid = server_pid(mountpoint)
        script = (
            f'exec 3<>"{mountpoint}/disk.raw"; : >"{tmp_path}/open"; sleep 2; cat <&3 >"{tmp_path}/copy"; sleep 600'
        )
        with copied(tmp_path, script) as holder:
            wait_for((tmp_path / "open").exists, "the open image")
            for _ in range(2):
                done = qedfs("umount", mountpoint, check=False)
                assert done.returncode == 8
                assert "disk.raw is open in a copy of it, in a mount namespace " in done.stderr
            assert not in_mount_table(mountpoint)
            assert is_running(pid)
            copy = tmp_path / "copy"
            wait_for(lambda: copy.exists() and copy.read_bytes() == disk.read_bytes(), "a read of the copy")
            command = ["umount", "--wait", "50s", str(mountpoint)]
            with popen(command, stderr=subprocess.PIPE) as waiting:
                assert waiting.stderr is not None
                assert b"waiting for that, for" in waiting.stderr.readline()
                _end_group(holder)
                assert waiting.wait(HANG_SECONDS) == 0
                assert b"Traceback" not in waiting.stderr.read()
            assert not is_running(pid)


@pytest.mark.parametrize("wait", [(), ("--wait", "1s")])
def test_a_mount_that_stands_elsewhere_too_goes_on_there(
    overlay: Path, disk: Path, folder: Path, mountpoint: Path, tmp_path: Path, wait: tuple[str, ...]
) -> None:
    require_root()
    other = tmp_path / "other"
    other.mkdir()
    with daemon(folder, mountpoint, "--no-stream", "--restart"):
        pid = server_pid(mountpoint)
        subprocess.run([require("mount"), "--bind", mountpoint, other], check=True)
        try:
            for option in ((), (), ("--if-mounted",)):
                done = qedfs("umount", mountpoint, *wait, *option, check=False)
                assert done.returncode == 8
                assert f"is unmounted, but is still mounted at {other}" in done.stderr
            assert (other / "disk.raw").read_bytes() == disk.read_bytes()
        finally:
            subprocess.run([require("umount"), other], check=True)
        wait_for(lambda: not is_running(pid), "the end of the server")


def test_a_later_mount_with_the_same_number_is_no_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel gives the number of a file system to the next one, which is soon where many mounts come and go."""
    table = tmp_path / "mountinfo"
    table.write_bytes(b"36 35 0:57 / /mnt/b rw - fuse.qedfs /b.qed rw\n37 35 0:57 / /mnt/c rw - tmpfs /a.qed rw\n")
    monkeypatch.setattr(procfs, "_TABLE", table)
    assert copies(MountInfo("0:57", FILESYSTEM, b"/a.qed"))[0] == []
    assert copies(MountInfo("0:57", FILESYSTEM, b"/b.qed"))[0] == ["/mnt/b"]
    assert copies(MountInfo("0:57", FILESYSTEM, b""))[0] == ["/mnt/b"]
