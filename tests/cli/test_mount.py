"""`qedfs mount`: in the foreground, as a daemon, with every way to write its options."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from qedfs.host.runtime import mount_folder
from qedfs.overlay.create import create_overlay
from tests.harness.hang import HANG_OPTION, HANG_SECONDS

from ..harness.images import first_difference, random_image
from ..harness.mounts import is_mounted, mounted, qedfs
from ..harness.process import free_port, wait_for
from ..harness.require import require, require_root
from ..harness.servers import Nginx
from ..harness.starter import popen
from .conftest import SIZE
from .support import QEDFS, daemon, image, in_mount_table, is_running, server_pid

# Read by every Python that starts with it in its PYTHONPATH; each holds a daemon's start up after it has noted its pid.
SLOW_STARTS = {
    "before it mounts": """
import os, sys, time
if any(word.startswith("--ready-fd=") for word in sys.orig_argv):
    with open({flag!r}, "x") as file:
        file.write(str(os.getpid()))
    time.sleep(30)
""",
    "while it mounts": """
import os, sys, time
if any(word.startswith("--ready-fd=") for word in sys.orig_argv):
    import pyfuse3
    init = pyfuse3.init
    def slow_init(*args):
        init(*args)
        with open({flag!r}, "x") as file:
            file.write(str(os.getpid()))
        time.sleep(1)
    pyfuse3.init = slow_init
""",
}

pytestmark = pytest.mark.fuse


def test_daemon_returns_when_the_mount_serves(overlay: Path, disk: Path, folder: Path, mountpoint: Path) -> None:
    with daemon(folder, mountpoint, "--restart"):
        assert first_difference(mountpoint / "disk.raw", disk) is None
        pid = server_pid(mountpoint)
        holder = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert os.getsid(pid) == os.getsid(holder) == holder
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


@pytest.mark.parametrize("moment", SLOW_STARTS)
def test_an_interrupted_start_leaves_no_daemon(overlay: Path, mountpoint: Path, tmp_path: Path, moment: str) -> None:
    flag, site = tmp_path / "pid", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SLOW_STARTS[moment].format(flag=str(flag)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [*QEDFS, "mount", str(overlay), str(mountpoint), "--daemon", "--no-stream"]
    waiting = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True)
    pid = 0
    try:
        wait_for(lambda: flag.exists() and flag.stat().st_size > 0, "the start of the daemon")
        pid = int(flag.read_text())
        os.kill(waiting.pid, signal.SIGINT)
        _, errors = waiting.communicate(timeout=HANG_SECONDS)
        assert (waiting.returncode, errors.strip()) == (130, b"")
        assert not is_running(pid)
        assert not in_mount_table(mountpoint)
    finally:
        waiting.kill()
        if pid and is_running(pid):
            os.kill(pid, signal.SIGKILL)
        if in_mount_table(mountpoint):
            subprocess.run([require("umount"), "--lazy", mountpoint], check=False)


def test_daemon_says_what_it_does_not_serve_as_expected(overlay: Path, folder: Path, mountpoint: Path) -> None:
    for number in range(8):
        (folder / f"text{number}.qed").write_text("no overlay at all")
    done = qedfs("mount", folder, mountpoint, "--daemon", "--no-stream")
    qedfs("umount", mountpoint)
    lines = done.stderr.splitlines()
    assert lines[0] == f"qedfs: {folder}/text0.qed: not a QED image: the file is shorter than a header"
    assert lines[5:] == ["qedfs: and 3 more such overlays: see qedfs status"]
    for path in (overlay, *folder.glob("text*.qed")):
        path.unlink()
    done = qedfs("mount", folder, mountpoint, "--daemon")
    qedfs("umount", mountpoint)
    assert done.stderr == f"qedfs: {folder}: has no overlay (*.qed) yet; any that appears will be served\n"


def test_an_overlay_that_cannot_be_written_is_said_to_be_read_only(overlay: Path, mountpoint: Path) -> None:
    """A read-only bind mount refuses root too."""
    require_root()
    subprocess.run([require("mount"), "--bind", overlay, overlay], check=True)
    try:
        subprocess.run([require("mount"), "-o", "remount,bind,ro", overlay], check=True)
        done = qedfs("mount", overlay, mountpoint, "--daemon")
        shown = qedfs("status", mountpoint).stdout
        qedfs("umount", mountpoint)
    finally:
        subprocess.run([require("umount"), "--lazy", overlay], check=True)
    assert f"{overlay}: is not writable; it is served read-only" in done.stderr
    assert "off (ro)" in shown


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("disk.qed", "is not a folder; name the overlay first, then the folder to mount on"),
        ("nowhere", "there is no such folder; make it first: mkdir -p "),
    ],
)
def test_a_mountpoint_that_is_no_folder(overlay: Path, folder: Path, name: str, advice: str) -> None:
    done = qedfs("mount", overlay, folder / name, "--daemon", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"qedfs: {folder / name}: {advice}")


def test_umount_tells_who_keeps_the_mount_busy_and_does_not_itself(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with (mountpoint / "disk.raw").open("rb"):
            busy = subprocess.run([*QEDFS, "umount", "."], cwd=mountpoint, capture_output=True, text=True, check=False)
        comm = Path("/proc/self/comm").read_text().strip()
        assert busy.returncode == 8
        assert busy.stderr == f"qedfs: {mountpoint}: is in use by pid {os.getpid()} ({comm}); close it there first\n"
        subprocess.run([*QEDFS, "umount", "."], cwd=mountpoint, check=True)
        assert not in_mount_table(mountpoint)


def test_umount_waits_for_whom_it_names(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with (mountpoint / "disk.raw").open("rb"):
            short = qedfs("umount", mountpoint, "--wait", "0.1s", check=False)
            assert short.returncode == 8
            assert short.stderr.endswith("close it there first\n")
            assert in_mount_table(mountpoint)
            words: list[str | Path] = ["umount", mountpoint, "--wait", "1h"]
            waiting = popen(words, stderr=subprocess.PIPE, text=True)
            assert waiting.stderr is not None
            assert f"in use by pid {os.getpid()} " in waiting.stderr.readline()
        _, rest = waiting.communicate(timeout=HANG_SECONDS)
        assert (waiting.returncode, rest) == (0, "")  # said once
        assert not in_mount_table(mountpoint)


def test_umount_of_what_need_not_be_there(overlay: Path, mountpoint: Path, tmp_path: Path) -> None:
    for place in (mountpoint, tmp_path / "none"):
        done = qedfs("umount", "--if-mounted", place)
        assert (done.stdout, done.stderr) == ("", "")
    with daemon(overlay, mountpoint, "--no-stream"):
        qedfs("umount", "--if-mounted", mountpoint)
        assert not in_mount_table(mountpoint)


def test_wait_until_nobody_has_an_image_open(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        words = ("wait", mountpoint, "--for", "unused", "--timeout")
        with (mountpoint / "disk.raw").open("rb"):
            done = qedfs(*words, "0.1s", check=False)
            assert done.returncode == 7
            assert done.stderr.splitlines()[0] == "qedfs: disk.raw is open"
            assert done.stderr.endswith("not unused within the timeout: disk.raw is open\n")
        done = qedfs(*words, "20s")
        assert (done.stdout, done.stderr) == ("", "")
        qedfs("umount", mountpoint)


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


def test_the_log_says_what_is_served_and_what_is_not(folder: Path, mountpoint: Path) -> None:
    create_overlay(str(folder / "local.qed"), image_size=1 << 20, backing="/srv/base.raw")
    create_overlay(str(folder / "away.qed"), image_size=1 << 20, backing=f"http://127.0.0.1:{free_port()}/x")
    (folder / "text.qed").write_text("no overlay")
    with mounted(folder, mountpoint, "--source-timeout", "300ms") as mount:
        wait_for(lambda: "away.raw: the stream waits: http://127.0.0.1" in mount.output(), "a line on the source")
        mount.unmount()
        log = mount.output()
    assert f"serving {folder} at {mountpoint}" in log
    assert f"not served: {folder}/local.qed: backing /srv/base.raw names" in log
    assert f"not served: {folder}/text.qed: not a QED image" in log
    assert log.count("the stream waits") == 1


def test_log_as_json(overlay: Path, mountpoint: Path) -> None:
    with mounted(overlay, mountpoint, "--log-json") as mount:
        mount.wait()
        mount.unmount()
        lines = [json.loads(line) for line in mount.output().splitlines()]
    assert any("complete" in line["message"] for line in lines)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


# secrets


def test_no_secret_is_shown(web: Nginx, folder: Path, mountpoint: Path) -> None:
    url = f"{web.url}/disk.img?sig=geheim".replace("http://", "http://user:geheim@")
    qedfs("create", folder / "disk.qed", "--backing", url, "--size", str(SIZE))
    gone = f"http://user:geheim@127.0.0.1:{free_port()}/x?sig=geheim"
    qedfs("create", folder / "gone.qed", "--backing", gone, "--offline", "--size", "1M")
    with daemon(folder, mountpoint, "--verbose", "--source-timeout", "300ms", own_interpreter=True):
        qedfs("wait", mountpoint, "disk", "--timeout", HANG_OPTION)
        wait_for(lambda: "geheim" not in _shown(mountpoint) and "127.0.0.1" in _shown(mountpoint), "a trouble")
        shown = _shown(mountpoint)
        pid = server_pid(mountpoint)
        shown += Path(f"/proc/{pid}/cmdline").read_text() + Path("/proc/self/mounts").read_text()
        qedfs("umount", mountpoint)
    assert "geheim" not in shown


def _shown(mountpoint: Path) -> str:
    status = qedfs("status", mountpoint).stdout + qedfs("status", mountpoint, "--json").stdout
    return status + (mount_folder(str(mountpoint)) / "log").read_text()


def test_the_arguments_of_a_daemon_show_no_login(web: Nginx, folder: Path, mountpoint: Path) -> None:
    url = web.url.replace("//", "//me:geheim@")
    qedfs("create", folder / "private.qed", "--backing", f"{url}/disk.img")
    with daemon(folder / "private.qed", mountpoint, "--allow-backing", url, own_interpreter=True):
        assert b"geheim" not in Path(f"/proc/{server_pid(mountpoint)}/cmdline").read_bytes()
        qedfs("wait", mountpoint, "--timeout", HANG_OPTION)
        qedfs("umount", mountpoint)
