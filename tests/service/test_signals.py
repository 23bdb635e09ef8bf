"""Signals to a real mount: a second one ends it at once, SIGUSR1 tells what it is doing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from qedfs.mount.signals import AGAIN_SECONDS
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import mounted
from tests.harness.process import wait_for
from tests.harness.require import require
from tests.mount.support import MIB, create, mounted_over, origin

# Read by every Python that starts with it in its PYTHONPATH: a disk that hangs from the moment when {flag} is there.
SLOW_DISK = """
import os, time
fdatasync = os.fdatasync
os.fdatasync = lambda fd: time.sleep({seconds}) if os.path.exists({flag!r}) else fdatasync(fd)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("restart", ["--restart", "--no-restart"])
def test_a_second_signal_ends_the_mount_at_once(tmp_path: Path, number: signal.Signals, restart: str) -> None:
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        env = _slow_disk(tmp_path, 3600)
        with mounted(overlay, tmp_path / "mnt", "--no-stream", restart, env=env) as mount:
            with mount.path("disk.raw").open("r+b") as image:
                image.write(b"something to flush")
            (tmp_path / "slow").touch()
            os.kill(mount.pid, number)
            wait_for(lambda: f"stopping on {number.name}" in mount.output(), "a word about the signal")
            os.kill(mount.pid, number)  # as timeout(1) does, which signals its child, and then the group
            time.sleep(AGAIN_SECONDS)
            assert mount.returncode is None
            os.kill(mount.pid, number)
            # A shell shows death by a signal as 128 + its number.
            assert mount.wait_exit() == -number


def test_a_mount_that_flushes_after_an_unmount_heeds_the_first_signal_too(tmp_path: Path) -> None:
    """`systemctl stop` of a mount that was unmounted a moment ago."""
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        env = _slow_disk(tmp_path, 1)
        with mounted(overlay, tmp_path / "mnt", "--no-stream", env=env) as mount:
            with mount.path("disk.raw").open("r+b") as image:
                image.write(b"something to flush")
            (tmp_path / "slow").touch()
            subprocess.run([require("fusermount3"), "-u", mount.mountpoint], check=True, timeout=HANG_SECONDS)
            os.kill(mount.pid, signal.SIGTERM)
            assert mount.wait_exit() == 0


def test_sigusr1_tells_tasks_and_queues(tmp_path: Path) -> None:
    with origin(tmp_path, 4 * MIB) as source, mounted_over(tmp_path, source.url, "--no-stream", "--log-json") as mount:
        mount.path("disk.raw").read_bytes()
        os.kill(mount.pid, signal.SIGUSR1)
        wait_for(lambda: "SIGUSR1" in mount.output(), "the dump")
        message = next(line["message"] for line in _lines(mount.output()) if "SIGUSR1" in line["message"])
        assert "task qedfs.mount.signals.dump_on_signal at qedfs/mount/signals.py:" in message
        assert "task qedfs.control.qmp.server.serve_control at qedfs/control/qmp/server.py:" in message
        # What was read may still be on its way into the overlay.
        assert re.search(rf"source {re.escape(source.url)}: \d+ requests in flight with .*, 0 readers wait", message)
        assert mount.image()["state"] == "off"
        assert mount.unmount() == 0


def test_sigusr1_tells_whom_a_reader_waits_for(tmp_path: Path) -> None:
    with (
        origin(tmp_path, 4 * MIB) as source,
        mounted_over(tmp_path, source.url, "--no-stream", "--source-timeout", "1h", "--log-json") as mount,
    ):
        _read_at(mount.path("disk.raw"), 0)
        _signal_all(source.server.pid, signal.SIGSTOP)
        reader = threading.Thread(target=_read_at, args=(mount.path("disk.raw"), 3 * MIB))
        reader.start()
        try:
            wait_for(lambda: sum(each["readers"] for each in mount.status()["sources"]) == 1, "the reader")
            os.kill(mount.pid, signal.SIGUSR1)
            wait_for(lambda: "SIGUSR1" in mount.output(), "the dump")
        finally:
            _signal_all(source.server.pid, signal.SIGCONT)
            reader.join(HANG_SECONDS)
        message = next(line["message"] for line in _lines(mount.output()) if "SIGUSR1" in line["message"])
        assert " 1 readers wait" in message
        assert re.search(rf" at {3 * MIB} for a reader, for \d+\.\d", message)
        assert "task qedfs.fetch.queue.FetchQueue._fly at qedfs/source/http/multi.py:" in message


def _slow_disk(folder: Path, seconds: int) -> dict[str, str]:
    """The environment for a mount whose barriers take so long once `folder`/slow is there."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SLOW_DISK.format(flag=str(folder / "slow"), seconds=seconds))
    return {"PYTHONPATH": str(site)}


def _lines(output: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _read_at(path: Path, pos: int) -> None:
    with path.open("rb", buffering=0) as image:
        image.seek(pos)
        image.read(4096)


def _signal_all(pid: int, number: signal.Signals) -> None:
    """To nginx's master and its workers, which do the work."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *map(int, children)):
        os.kill(one, number)
