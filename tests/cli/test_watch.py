"""`qedfs status` and `qedfs wait` on real mounts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.harness.hang import HANG_OPTION, HANG_SECONDS

from ..harness.images import random_image
from ..harness.mounts import qedfs
from ..harness.process import wait_for
from ..harness.servers import Nginx
from ..harness.starter import popen
from .conftest import SIZE
from .support import SLOW, connections, daemon, image, in_mount_table

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
    words: list[str | Path] = ["status", mountpoint, "--watch", "--json"]
    with daemon(overlay, mountpoint, "--no-stream"), popen(words, stdout=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["images"][0]["state"] == "off"
        qedfs("umount", mountpoint)
        for line in watch.stdout.readlines():
            assert json.loads(line)
        assert watch.wait(HANG_SECONDS) == 0


# wait


def test_wait_until_complete(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--limit", "16M"):
        qedfs("wait", mountpoint, "disk", "--timeout", HANG_OPTION)
        assert image(mountpoint)["state"] == "complete"
        qedfs("wait", mountpoint, "--timeout", "1ms")
        qedfs("umount", mountpoint)
    assert json.loads(qedfs("info", overlay, "--json").stdout)["complete"]


@pytest.mark.parametrize("name", [(), ("new",)])
def test_wait_knows_an_overlay_that_has_just_come(
    web: Nginx, overlay: Path, folder: Path, mountpoint: Path, name: tuple[str, ...]
) -> None:
    with daemon(folder, mountpoint):
        qedfs("wait", mountpoint, "--timeout", HANG_OPTION)
        qedfs("create", folder / "new.qed", "--backing", f"{web.url}/disk.img")
        qedfs("wait", mountpoint, *name, "--timeout", HANG_OPTION)
        assert json.loads(qedfs("status", mountpoint, "--json").stdout)["images"][1]["state"] == "complete"
        qedfs("umount", mountpoint)
    assert json.loads(qedfs("info", folder / "new.qed", "--json").stdout)["complete"]


def test_wait_says_that_there_is_nothing_to_wait_for(folder: Path, mountpoint: Path) -> None:
    with daemon(folder, mountpoint):
        assert "has no overlays" in qedfs("wait", mountpoint).stderr
        qedfs("umount", mountpoint)


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
        done = qedfs("wait", mountpoint, "--timeout", HANG_OPTION, check=False)
        assert done.returncode == 5
        qedfs("umount", mountpoint)


def test_wait_fails_when_the_source_is_gone_for_good(disk: Path, overlay: Path, mountpoint: Path) -> None:
    disk.unlink()
    with daemon(overlay, mountpoint):
        done = qedfs("wait", mountpoint, "--timeout", HANG_OPTION, check=False)
        assert (done.returncode, "404" in done.stderr) == (4, True)
        qedfs("umount", mountpoint)


def test_wait_for_a_mount_that_leaves_when_it_is_done(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--until-streamed", *SLOW):
        with popen(["wait", mountpoint, "--timeout", HANG_OPTION]) as waiting:
            wait_for(lambda: connections(mountpoint) > 0, "the waiting client")
            qedfs("stream", "limit", mountpoint, "0")
            assert waiting.wait(HANG_SECONDS) == 0
        wait_for(lambda: not in_mount_table(mountpoint), "the mount's end")


def test_wait_for_a_mount_that_ends_too_early(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, *SLOW):
        with popen(["wait", mountpoint], stderr=subprocess.PIPE, text=True) as waiting:
            wait_for(lambda: connections(mountpoint) > 0, "the waiting client")
            qedfs("umount", mountpoint)
            _, told = waiting.communicate(timeout=HANG_SECONDS)
        assert waiting.returncode == 10
        assert "before the images were complete" in told


def test_interrupted_wait_says_nothing(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--limit", "64K"):
        with popen(["wait", mountpoint], stderr=subprocess.PIPE, text=True) as waiting:
            wait_for(lambda: connections(mountpoint) > 0, "the waiting client")
            waiting.send_signal(signal.SIGINT)
            _, told = waiting.communicate(timeout=HANG_SECONDS)
        assert (waiting.returncode, told.strip()) == (130, "")
        qedfs("umount", mountpoint)
