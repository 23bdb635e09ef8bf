"""An image that grows while it is mounted: loop devices and QEMU see it. Killed: test_kills.py."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.control.qmp.client import Client
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import QedfsError, UsageError
from tests.harness.images import qemu_info
from tests.harness.mounts import Mount, qedfs
from tests.harness.process import Child, listening
from tests.harness.require import require, require_root

from .support import MIB, assert_whole, create, mounted_over, origin, read_direct, write_direct

SIZE = 4 * MIB


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[str]:
    require_root()
    done = subprocess.run(
        [require("losetup"), "--find", "--show", path], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        yield done
    finally:
        subprocess.run([require("losetup"), "--detach", done], check=True)


@contextlib.contextmanager
def storage_daemon(folder: Path, path: Path) -> Iterator[QemuClient]:
    """QEMU has the image open as the node `disk`."""
    argv = [
        *(require("qemu-storage-daemon"), "--blockdev", f"driver=file,node-name=disk,filename={path}"),
        *("--chardev", f"socket,id=qmp,path={folder / 'qsd'},server=on,wait=off", "--monitor", "chardev=qmp"),
    ]
    child = Child(argv, folder / "qsd-log")
    try:
        child.wait_until(lambda: listening(folder / "qsd"), "a QMP socket")
        with QemuClient.at(str(folder / "qsd")) as client:
            yield client
    finally:
        child.stop()


def block_resize(mount: Mount, size: int) -> None:
    with Client.connect(str(mount.mountpoint)) as client:
        client.execute("block_resize", node_name="disk", size=size)


def test_all_that_have_it_open_see_the_new_size(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE - 1536) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        image = mount.path("disk.raw")
        assert image.stat().st_size == SIZE - 1536
        with loop_device(image) as device, storage_daemon(tmp_path, image) as qemu:
            block_resize(mount, 2 * SIZE)
            assert image.stat().st_size == 2 * SIZE
            subprocess.run([require("losetup"), "--set-capacity", device], check=True)
            assert int(Path(f"/sys/block/{Path(device).name}/size").read_text()) * 512 == 2 * SIZE
            qemu.execute("block_resize", **{"node-name": "disk", "size": 2 * SIZE})
            [node] = qemu.execute("query-named-block-nodes")
            assert node["image"]["virtual-size"] == 2 * SIZE
        assert write_direct(image, 2 * SIZE - 4096, b"e" * 4096) == 4096
        assert mount.image()["size"] == 2 * SIZE
        done = json.loads(qedfs("resize", mount.mountpoint, "disk", "+4M", "--json").stdout)
        assert done == {
            "overlay": str(tmp_path / "disk.qed"),
            "image": "disk.raw",
            "size": 3 * SIZE,
            "size_before": 2 * SIZE,
        }
        qedfs("stream", "start", mount.mountpoint)
        mount.wait()
        assert (mount.image()["populated"], mount.image()["total"]) == (3 * SIZE, 3 * SIZE)
        expected = source.data().ljust(2 * SIZE - 4096, b"\0") + b"e" * 4096 + bytes(SIZE)
        assert read_direct(image, 0, 3 * SIZE) == expected
        assert mount.unmount() == 0
        (tmp_path / "expected").write_bytes(expected)
        assert qemu_info(tmp_path / "disk.qed")["virtual-size"] == 3 * SIZE
        assert_whole(tmp_path / "disk.qed", tmp_path / "expected")


def test_what_is_refused_says_so_in_one_line(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        create(tmp_path / "disk.qed", source.url, "--size", "1M", "--shrink")
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            done = qedfs("resize", mount.mountpoint, "disk", "8M", check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert "disk.raw: its backing has 4194304 bytes, and the image 1048576" in done.stderr
            with pytest.raises(UsageError, match="only grows while it is mounted"):
                block_resize(mount, 512)
            with pytest.raises(QedfsError, match="expects a >0 size"):
                block_resize(mount, -1)
            with Client.connect(str(mount.mountpoint)) as client:
                with pytest.raises(QedfsError, match="Cannot find device='' nor node-name='none'"):
                    client.execute("block_resize", node_name="none", size=512)
                with pytest.raises(QedfsError, match="Cannot find device='' nor node-name=''"):
                    client.execute("block_resize", size=512)
            done = qedfs("resize", tmp_path / "disk.qed", "8M", check=False)
            assert done.returncode == 8  # in use
