"""`qedfs stream` and `qedfs umount` on real mounts."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from ..harness.hang import HANG_OPTION
from ..harness.images import first_difference
from ..harness.mounts import qedfs
from ..harness.process import wait_for
from ..harness.servers import Nginx
from .support import SLOW, daemon, image, in_mount_table, is_running, server_pid

# stream


def test_driving_a_stream(overlay: Path, disk: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        qedfs("stream", "limit", mountpoint, "disk", "256K")
        (found,) = json.loads(qedfs("stream", "start", mountpoint, "--json").stdout)["images"]
        assert found["limit"] == 256 << 10
        qedfs("stream", "pause", mountpoint, "disk.raw")
        wait_for(lambda: image(mountpoint)["state"] == "paused", "a pause")
        qedfs("umount", mountpoint)
    # The overlay remembers that it is paused.
    with daemon(overlay, mountpoint):
        wait_for(lambda: image(mountpoint)["state"] == "paused", "a pause")
        qedfs("stream", "resume", mountpoint)
        qedfs("wait", mountpoint, "--timeout", HANG_OPTION)
        assert first_difference(mountpoint / "disk.raw", disk) is None
        qedfs("umount", mountpoint)


def test_cancel_and_start(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, *SLOW):
        qedfs("stream", "cancel", mountpoint)
        wait_for(lambda: image(mountpoint)["state"] == "off", "the cancel")
        qedfs("stream", "start", mountpoint, "--limit", "0")
        qedfs("wait", mountpoint, "--timeout", HANG_OPTION)
        qedfs("umount", mountpoint)


def test_steps(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        first = json.loads(qedfs("stream", "step", mountpoint, "--offset", "1M", "--json").stdout)
        assert (first["image"], first["pos"]) == ("disk.raw", 1 << 20)
        assert first["next"] == first["pos"] + first["size"]
        assert image(mountpoint)["populated"] == first["size"]
        assert "next at" in qedfs("stream", "step", mountpoint, "disk").stdout
        qedfs("umount", mountpoint)


def test_step_on_a_dead_source(web: Nginx, overlay: Path, mountpoint: Path) -> None:
    web.stop()
    with daemon(overlay, mountpoint, "--no-stream", "--source-timeout", "300ms"):
        done = qedfs("stream", "step", mountpoint, check=False)
        assert done.returncode == 4
        qedfs("umount", mountpoint)


def test_usage_of_limit(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        qedfs("stream", "limit", mountpoint, "3M")
        assert image(mountpoint)["limit"] == 3 << 20
        assert qedfs("stream", "limit", mountpoint, "fast", check=False).returncode == 2
        assert qedfs("stream", "limit", mountpoint, "a", "b", "c", check=False).returncode == 2
        assert qedfs("stream", "limit", mountpoint, "nope", "3M", check=False).returncode == 2
        qedfs("umount", mountpoint)


# umount


def test_the_overlay_is_free_when_umount_returns(overlay: Path, mountpoint: Path) -> None:
    for _ in range(2):
        with daemon(overlay, mountpoint):
            with (mountpoint / "disk.raw").open("r+b") as file:
                file.write(b"x" * 100_000)
            qedfs("umount", mountpoint)
            assert qedfs("check", overlay, "--repair").returncode == 0


def test_umount_of_a_busy_mount_tells_by_whom(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with (mountpoint / "disk.raw").open("rb"):
            done = qedfs("umount", mountpoint, check=False)
        assert done.returncode == 8
        assert f"pid {os.getpid()}" in done.stderr
        qedfs("umount", mountpoint)


def test_umount_of_a_dead_mount(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream", "--no-restart"):
        pid = server_pid(mountpoint)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_running(pid), "its end")
        status = qedfs("status", mountpoint, check=False)
        assert (status.returncode, status.stdout) == (10, "")
        assert f"has died; run: qedfs umount {mountpoint}" in status.stderr
        assert qedfs("mount", overlay, mountpoint, "--daemon", check=False).returncode == 8
        qedfs("umount", mountpoint)
        assert not in_mount_table(mountpoint)
    # And what it left in the runtime folder is in nobody's way.
    with daemon(overlay, mountpoint, "--no-stream"):
        qedfs("umount", mountpoint)


def test_umount_of_what_is_not_ours(mountpoint: Path) -> None:
    for place, code in ((mountpoint, 10), (mountpoint / "nowhere", 2), (Path("/proc"), 2)):
        done = qedfs("umount", place, check=False)
        assert done.returncode == code
        assert re.fullmatch(r"qedfs: [^\n]+\n", done.stderr)
    assert in_mount_table(Path("/proc"))


@pytest.mark.parametrize("command", [["status"], ["wait"], ["stream", "start"], ["stream", "step"]])
def test_commands_without_a_mount(mountpoint: Path, command: list[str]) -> None:
    done = qedfs(*command, mountpoint, check=False)
    assert (done.returncode, done.stdout) == (10, "")
    assert re.fullmatch(r"qedfs: [^\n]+\n", done.stderr)
