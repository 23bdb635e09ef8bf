"""Commands that start, watch, drive and end real mounts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qedfs.control.client import Client
from qedfs.overlay.create import create_overlay
from qedfs.runtime import mount_folder

from ..harness.images import first_difference, random_image
from ..harness.mounts import is_mounted, mounted, qedfs
from ..harness.process import free_port, wait_for
from ..harness.servers import Nginx
from .conftest import SIZE

QEDFS = [sys.executable, "-m", "qedfs"]
SLOW = ("--limit", "512K")


@pytest.fixture
def overlay(web: Nginx, folder: Path) -> Path:
    path = folder / "disk.qed"
    qedfs("create", path, "--backing", f"{web.url}/disk.img")
    return path


@contextlib.contextmanager
def daemon(source: Path, mountpoint: Path, *options: str) -> Iterator[None]:
    """A mount in the background that ends with the block, whatever happened."""
    qedfs("mount", source, mountpoint, "--daemon", *options)
    try:
        yield
    finally:
        if in_mount_table(mountpoint):
            subprocess.run(["umount", "--lazy", mountpoint], check=False)


def in_mount_table(mountpoint: Path) -> bool:
    return f" {mountpoint} " in Path("/proc/self/mountinfo").read_text()


def image(mountpoint: Path) -> dict[str, Any]:
    (found,) = json.loads(qedfs("status", mountpoint, "--json").stdout)["images"]
    return dict(found)


def server_pid(mountpoint: Path) -> int:
    with Client.connect(str(mountpoint)) as client:
        return client.server_pid


def is_running(pid: int) -> bool:
    """Whether the process has not ended; a zombie that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# mount


def test_daemon_returns_when_the_mount_serves(overlay: Path, disk: Path, folder: Path, mountpoint: Path) -> None:
    with daemon(folder, mountpoint):
        assert first_difference(mountpoint / "disk.raw", disk) is None
        pid = server_pid(mountpoint)
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        assert os.readlink(f"/proc/{pid}/fd/2") == str(mount_folder(str(mountpoint)) / "log")
        qedfs("umount", mountpoint)
        assert not is_running(pid)
        assert not in_mount_table(mountpoint)


def test_daemon_reports_why_it_does_not_serve(overlay: Path, folder: Path, mountpoint: Path, tmp_path: Path) -> None:
    (folder / "text.qed").write_text("no overlay")
    local = folder / "local.qed"
    random_image(tmp_path / "base.raw", 4096)
    qedfs("create", local, "--backing", tmp_path / "base.raw")
    for source, target, exit_code in [
        (folder / "nope.qed", mountpoint, 2),
        (folder / "text.qed", mountpoint, 3),
        (local, mountpoint, 9),
        (overlay, tmp_path / "nowhere", 2),
        (folder, folder, 2),
    ]:
        done = qedfs("mount", source, target, "--daemon", check=False)
        assert (done.returncode, done.stdout) == (exit_code, "")
        assert re.fullmatch(r"qedfs: [^\n]+\n", done.stderr), done.stderr
        assert not in_mount_table(target)


def test_two_mounts_do_not_share_a_place_or_an_overlay(overlay: Path, mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with daemon(overlay, mountpoint):
        assert qedfs("mount", overlay, mountpoint, "--daemon", check=False).returncode == 8
        assert qedfs("mount", overlay, tmp_path / "other", "--daemon", check=False).returncode == 8
        assert image(mountpoint)["name"] == "disk.raw"
        qedfs("umount", mountpoint)


def test_wrong_options(overlay: Path, mountpoint: Path) -> None:
    for options in (
        ["--until-streamed", "--no-stream"],
        ["--limit", "fast"],
        ["--stream-between", "noon"],
        ["--stream-delay", "5m-1m"],
        ["-o", "limit=20M,nonsense=1"],
    ):
        done = qedfs("mount", overlay, mountpoint, "--daemon", *options, check=False)
        assert done.returncode == 2, options
        assert "Traceback" not in done.stderr


def test_options_of_fstab(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "-o", "rw,nofail,x-systemd.automount,limit=1M,no_stream,no-copy-on-read"):
        found = image(mountpoint)
        assert (found["state"], found["limit"], found["copy_on_read"]) == ("off", 1 << 20, False)
        qedfs("umount", mountpoint)


def test_stream_rules(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--stream-delay", "1h"):
        found = image(mountpoint)
        assert found["state"] in ("off", "waiting")
        wait_for(lambda: "starts in" in (image(mountpoint)["reason"] or ""), "the reason")
        assert "starts in" in qedfs("status", mountpoint).stdout
        qedfs("umount", mountpoint)


def test_interrupted_mount_ends_in_order(overlay: Path, mountpoint: Path) -> None:
    with mounted(overlay, mountpoint) as mount:
        mount.wait()
        os.kill(mount.pid, signal.SIGINT)
        assert mount.wait_exit() == 0
        assert not is_mounted(mountpoint)
        assert "Traceback" not in mount.output()


def test_log_as_json(overlay: Path, mountpoint: Path) -> None:
    with mounted(overlay, mountpoint, "--log-json") as mount:
        mount.wait()
        mount.unmount()
        lines = [json.loads(line) for line in mount.output().splitlines()]
    assert any("complete" in line["message"] for line in lines)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def on_a_terminal(*words: str | Path, seconds: float) -> str:
    """What a command draws on a terminal of 80 columns; it is interrupted after `seconds` if it has not ended."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    child = subprocess.Popen([*QEDFS, *words], stdin=follower, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    drawn = b""
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while data := os.read(leader, 65536):
            drawn += data
            if time.monotonic() > end:
                child.send_signal(signal.SIGINT)
                end = float("inf")
    child.wait(20)
    os.close(leader)
    return drawn.decode()


def test_bars_on_a_terminal(overlay: Path, mountpoint: Path) -> None:
    drawn = on_a_terminal("mount", overlay, mountpoint, "--limit", "1M", seconds=2.0)
    assert "disk.raw" in drawn
    assert re.search(r"\d+%", drawn)
    assert "iB/s" in drawn
    assert "Traceback" not in drawn


def test_many_images_share_one_bar(folder: Path, mountpoint: Path) -> None:
    for number in range(11):
        create_overlay(str(folder / f"{number}.qed"), image_size=1 << 20, backing=None)
    drawn = on_a_terminal("mount", folder, mountpoint, seconds=1.0)
    assert "11 of 11 complete" in drawn
    assert "10.raw" not in drawn


# status


def test_status_for_programs_and_for_people(overlay: Path, folder: Path, mountpoint: Path) -> None:
    (folder / "bad.qed").write_text("no overlay")
    with daemon(folder, mountpoint, "--no-stream"):
        found = json.loads(qedfs("status", mountpoint, "--json").stdout)
        assert found["mountpoint"] == str(mountpoint)
        assert Path(found["socket"]).is_socket()
        bad, disk = found["images"]
        assert (bad["name"], bad["state"], bad["exit_code"]) == ("bad.raw", "broken", 3)
        assert disk["overlay"] == str(overlay)
        assert (disk["state"], disk["size"], disk["total"], disk["populated"]) == ("off", SIZE, SIZE, 0)
        assert (disk["rate"], disk["eta_seconds"], disk["error"]) == (0, None, None)
        table = qedfs("status", mountpoint).stdout
        assert max(map(len, table.splitlines())) <= 80
        assert re.search(r"disk\.raw +off +0 B +4\.00 MiB +0%", table)
        assert "bad.raw: " in table
        qedfs("umount", mountpoint)


def test_rate_and_remaining_time(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--limit", "1M"):
        wait_for(lambda: image(mountpoint)["eta_seconds"] is not None, "an estimate")
        found = image(mountpoint)
        assert found["state"] == "running"
        assert 0 < found["rate"] < 4 << 20
        assert 0 < found["eta_seconds"] < 60
        qedfs("umount", mountpoint)


def test_watching_ends_with_the_mount(overlay: Path, mountpoint: Path) -> None:
    words = [*QEDFS, "status", mountpoint, "--watch", "--json"]
    with daemon(overlay, mountpoint, "--no-stream"), subprocess.Popen(words, stdout=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["images"][0]["state"] == "off"
        qedfs("umount", mountpoint)
        for line in watch.stdout.readlines():
            assert json.loads(line)
        assert watch.wait(20) == 0


# wait


def test_wait_until_complete(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--limit", "16M"):
        qedfs("wait", mountpoint, "disk", "--timeout", "50s")
        assert image(mountpoint)["state"] == "complete"
        qedfs("wait", mountpoint, "--timeout", "1ms")
        qedfs("umount", mountpoint)
    assert json.loads(qedfs("info", overlay, "--json").stdout)["complete"]


def test_wait_gives_up_in_time(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        done = qedfs("wait", mountpoint, "--timeout", "200ms", check=False)
        assert done.returncode == 7
        assert "disk.raw is off" in done.stderr
        assert "qedfs stream start" in done.stderr
        qedfs("umount", mountpoint)


def test_wait_for_a_part(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        words = ("wait", mountpoint, "--for", "populated:1M-1088K", "--timeout")
        assert qedfs(*words, "200ms", check=False).returncode == 7
        with (mountpoint / "disk.raw").open("rb") as file:
            os.pread(file.fileno(), 65536, 1 << 20)
        qedfs(*words, "20s")
        qedfs("umount", mountpoint)


@pytest.mark.parametrize("name", ["nope", "nope.raw"])
def test_wait_for_an_image_that_is_not_there(overlay: Path, mountpoint: Path, name: str) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        done = qedfs("wait", mountpoint, name, check=False)
        assert (done.returncode, "disk.raw" in done.stderr) == (2, True)
        qedfs("umount", mountpoint)


def test_wait_fails_when_the_source_is_another_version(web: Nginx, disk: Path, overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with (mountpoint / "disk.raw").open("rb") as file:
            file.read(65536)
        random_image(disk, SIZE, seed=1)
        os.utime(disk, (1, 1))
        qedfs("stream", "start", mountpoint)
        done = qedfs("wait", mountpoint, "--timeout", "30s", check=False)
        assert done.returncode == 5
        qedfs("umount", mountpoint)


def test_wait_fails_when_the_source_is_gone_for_good(disk: Path, overlay: Path, mountpoint: Path) -> None:
    disk.unlink()
    with daemon(overlay, mountpoint):
        done = qedfs("wait", mountpoint, "--timeout", "30s", check=False)
        assert (done.returncode, "404" in done.stderr) == (4, True)
        qedfs("umount", mountpoint)


def test_wait_for_a_mount_that_leaves_when_it_is_done(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--until-streamed", *SLOW):
        with subprocess.Popen([*QEDFS, "wait", mountpoint, "--timeout", "50s"]) as waiting:
            wait_for(lambda: _connections(mountpoint) > 0, "the waiting client")
            qedfs("stream", "limit", mountpoint, "0")
            assert waiting.wait(60) == 0
        wait_for(lambda: not in_mount_table(mountpoint), "the mount's end")


def test_wait_for_a_mount_that_ends_too_early(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, *SLOW):
        with subprocess.Popen([*QEDFS, "wait", mountpoint], stderr=subprocess.PIPE, text=True) as waiting:
            wait_for(lambda: _connections(mountpoint) > 0, "the waiting client")
            qedfs("umount", mountpoint)
            _, told = waiting.communicate(timeout=20)
        assert waiting.returncode == 1
        assert "before the images were complete" in told


def test_interrupted_wait_says_nothing(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, *SLOW):
        with subprocess.Popen([*QEDFS, "wait", mountpoint], stderr=subprocess.PIPE, text=True) as waiting:
            wait_for(lambda: _connections(mountpoint) > 0, "the waiting client")
            waiting.send_signal(signal.SIGINT)
            _, told = waiting.communicate(timeout=20)
        assert (waiting.returncode, told.strip()) == (130, "")
        qedfs("umount", mountpoint)


def _connections(mountpoint: Path) -> int:
    """Clients that are connected to the control socket: rows of the kernel's table beside the listening one."""
    name = str(mount_folder(str(mountpoint)) / "control.sock")
    return sum(row.endswith(name) for row in Path("/proc/net/unix").read_text().splitlines()) - 1


# stream


def test_driving_a_stream(overlay: Path, disk: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        qedfs("stream", "limit", mountpoint, "disk", "256K")
        (found,) = json.loads(qedfs("stream", "start", mountpoint, "--json").stdout)
        assert found["limit"] == 256 << 10
        qedfs("stream", "pause", mountpoint, "disk.raw")
        wait_for(lambda: image(mountpoint)["state"] == "paused", "a pause")
        qedfs("umount", mountpoint)
    # The overlay remembers that it is paused.
    with daemon(overlay, mountpoint):
        wait_for(lambda: image(mountpoint)["state"] == "paused", "a pause")
        qedfs("stream", "resume", mountpoint)
        qedfs("wait", mountpoint, "--timeout", "50s")
        assert first_difference(mountpoint / "disk.raw", disk) is None
        qedfs("umount", mountpoint)


def test_cancel_and_start(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, *SLOW):
        qedfs("stream", "cancel", mountpoint)
        wait_for(lambda: image(mountpoint)["state"] == "off", "the cancel")
        qedfs("stream", "start", mountpoint, "--limit", "0")
        qedfs("wait", mountpoint, "--timeout", "50s")
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
    with daemon(overlay, mountpoint, "--no-stream"):
        pid = server_pid(mountpoint)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_running(pid), "its end")
        status = qedfs("status", mountpoint, check=False)
        assert (status.returncode, status.stdout) == (2, "")
        assert f"has died; run: qedfs umount {mountpoint}" in status.stderr
        assert qedfs("mount", overlay, mountpoint, "--daemon", check=False).returncode == 8
        qedfs("umount", mountpoint)
        assert not in_mount_table(mountpoint)
    # And what it left in the runtime folder is in nobody's way.
    with daemon(overlay, mountpoint, "--no-stream"):
        qedfs("umount", mountpoint)


def test_umount_of_what_is_not_ours(mountpoint: Path) -> None:
    for place in (mountpoint, mountpoint / "nowhere", Path("/proc")):
        done = qedfs("umount", place, check=False)
        assert done.returncode == 2
        assert re.fullmatch(r"qedfs: [^\n]+\n", done.stderr)
    assert in_mount_table(Path("/proc"))


@pytest.mark.parametrize("command", [["status"], ["wait"], ["stream", "start"], ["stream", "step"]])
def test_commands_without_a_mount(mountpoint: Path, command: list[str]) -> None:
    done = qedfs(*command, mountpoint, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"qedfs: [^\n]+\n", done.stderr)


# secrets


def test_no_secret_is_shown(web: Nginx, folder: Path, mountpoint: Path) -> None:
    url = f"{web.url}/disk.img?sig=geheim".replace("http://", "http://user:geheim@")
    qedfs("create", folder / "disk.qed", "--backing", url, "--size", str(SIZE))
    gone = f"http://user:geheim@127.0.0.1:{free_port()}/x?sig=geheim"
    qedfs("create", folder / "gone.qed", "--backing", gone, "--size", "1M")
    with daemon(folder, mountpoint, "--verbose", "--source-timeout", "300ms"):
        qedfs("wait", mountpoint, "disk", "--timeout", "50s")
        wait_for(lambda: "geheim" not in _shown(mountpoint) and "127.0.0.1" in _shown(mountpoint), "a trouble")
        shown = _shown(mountpoint)
        pid = server_pid(mountpoint)
        shown += Path(f"/proc/{pid}/cmdline").read_text() + Path("/proc/self/mounts").read_text()
        qedfs("umount", mountpoint)
    assert "geheim" not in shown


def _shown(mountpoint: Path) -> str:
    status = qedfs("status", mountpoint).stdout + qedfs("status", mountpoint, "--json").stdout
    return status + (mount_folder(str(mountpoint)) / "log").read_text()
