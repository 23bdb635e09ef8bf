"""`qedfs source set`: the same disk at another address is used at once and from then on, another disk is not."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import random_image
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.servers import nbdkit, nginx, qemu_nbd

from .support import MIB, assert_whole, create, read_direct
from .test_source_away import READ, away, stalled

SIZE = 16 * MIB


def test_readers_that_wait_go_on_at_another_port(tmp_path: Path) -> None:
    with away(tmp_path, "--on-source-error", "wait") as (mount, _, data), nbdkit("file", tmp_path / "disk") as again:
        words = [sys.executable, "-c", READ, str(mount.path("disk.raw")), str(4 * MIB)]
        reader = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: stalled(mount) == 1, "a reader that waits")
            socket = again.url.rpartition("=")[2]
            done = qedfs("source", "set", mount.mountpoint, "disk", again.url, check=False)
            assert done.returncode == 9  # the mount allows no local socket
            assert socket in done.stderr
            with qemu_nbd(tmp_path / "disk", fmt="raw", tcp=True) as other:
                shown = json.loads(qedfs("source", "set", mount.mountpoint, "disk", other.url, "--json").stdout)
                assert shown["images"][0]["backing"] == other.url
                out, _ = reader.communicate(timeout=HANG_SECONDS)
                assert bytes.fromhex(out) == data[4 * MIB : 4 * MIB + 65536]
                mount.kill()
                assert qedfs("info", tmp_path / "disk.qed", "--json").stdout.count(other.url) == 1
                with mounted(tmp_path / "disk.qed", mount.mountpoint) as later:
                    later.wait()
                    assert later.unmount() == 0
                assert_whole(tmp_path / "disk.qed", tmp_path / "disk")
        finally:
            reader.kill()
            reader.wait()


def test_another_disk_of_equal_size_is_refused_live_and_at_a_reconnect(tmp_path: Path) -> None:
    raw, other = random_image(tmp_path / "disk", SIZE), tmp_path / "other"
    # A clone: a third of its blocks differ.
    content, chosen = bytearray(raw.read_bytes()), random.Random(6)
    for pos in range(0, SIZE, 4096):
        if chosen.random() < 1 / 3:
            content[pos : pos + 8] = b"changed!"
    other.write_bytes(content)
    served = tmp_path / "served"
    shutil.copy(raw, served)
    with (
        nbdkit("file", served, tcp=True) as server,
        nbdkit("file", other, tcp=True) as clone,
        nbdkit("file", raw, tcp=True) as right,
    ):
        create(tmp_path / "disk.qed", server.url)
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--no-stream", "--source-timeout", "5s") as mount:
            image = mount.path("disk.raw")
            for pos in range(0, SIZE // 2, 65536):
                read_direct(image, pos, 4096)
            done = qedfs("source", "set", mount.mountpoint, "disk", clone.url, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (5, 1)
            done = qedfs("source", "set", mount.mountpoint, "disk", image, check=False)
            assert (done.returncode, "is in this mount" in done.stderr) == (2, True)
            assert mount.image()["backing"] == server.url
            assert mount.image()["error"] is None
            # The server is swapped without a word.
            server.kill()
            shutil.copy(other, served)
            server.restart()
            with pytest.raises(OSError, match="Input/output error"):
                read_direct(image, SIZE - MIB, MIB)
            assert mount.image()["condition"][0]["cause"] == "source-changed"
            # The right disk elsewhere ends that.
            qedfs("source", "set", mount.mountpoint, "disk", right.url)
            assert read_direct(image, 0, SIZE) == raw.read_bytes()


def test_one_of_several_images_of_a_source_is_set_elsewhere(tmp_path: Path) -> None:
    www, folder = tmp_path / "www", tmp_path / "overlays"
    www.mkdir()
    folder.mkdir()
    raw = random_image(www / "disk", 4 * MIB)
    shutil.copy(raw, www / "mirror")
    with nginx(www) as server, nginx(www) as mirror:
        for name in ("a", "b"):
            create(folder / f"{name}.qed", f"{server.url}/disk")
        with mounted(folder, tmp_path / "mnt", "--no-stream") as mount:
            for name in ("a.raw", "b.raw"):
                read_direct(mount.path(name), 0, 65536)
            qedfs("source", "set", mount.mountpoint, "a", f"{mirror.url}/mirror")
            mirror.forget()
            assert read_direct(mount.path("a.raw"), 0, 4 * MIB) == raw.read_bytes()
            assert mirror.body_bytes() > 3 * MIB
            assert read_direct(mount.path("b.raw"), 0, 4 * MIB) == raw.read_bytes()
            assert mount.image("b.raw")["backing"] == f"{server.url}/disk"
            assert mount.image("a.raw")["error"] is None
            qedfs("stream", "start", mount.mountpoint)
            mount.wait()
            done = qedfs("source", "set", mount.mountpoint, "a", server.url, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
