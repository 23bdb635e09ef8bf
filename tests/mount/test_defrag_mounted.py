"""Defragmentation of a mounted image: beside a guest, over the command line, and killed in the middle of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path

from qedfs.control.qmp.client import Client
from tests.harness.images import qemu_check, qemu_info, qemu_same
from tests.harness.mounts import Mount, qedfs
from tests.harness.process import wait_for

from .kills import Overlay, kill_once
from .kills_beside import Jobs
from .support import MIB, create, mounted_over, opened, origin, read_direct

CLUSTER = 4096


def fill_at_random(image: Path) -> None:
    """Read a part of each 64 KiB, in the order of chance."""
    places = list(range(0, image.stat().st_size, 65536))
    random.Random(1).shuffle(places)
    for pos in places:
        read_direct(image, pos, CLUSTER)


def pieces(overlay: Path) -> int:
    found: int = json.loads(qedfs("info", overlay, "--json").stdout)["pieces"]
    return found


def test_it_is_in_order_afterwards_while_a_guest_writes(tmp_path: Path) -> None:
    with origin(tmp_path, 16 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            image, place = mount.path("disk.raw"), mount.mountpoint
            fill_at_random(image)
            wait_for(lambda: pieces(overlay) > 100, "the commit of all that was read")
            assert "has no defrag at work" in qedfs("defrag", place, "disk", "--pause", check=False).stderr
            expected, done = bytearray(source.data()), threading.Event()

            def write() -> None:
                chosen = random.Random(5)
                with opened(image) as fd:
                    while not done.is_set():
                        pos, part = chosen.randrange(4000) * CLUSTER, chosen.randbytes(chosen.choice((512, 16384)))
                        os.pwrite(fd, part, pos)
                        expected[pos : pos + len(part)] = part
                    os.fsync(fd)

            qedfs("defrag", place, "disk", "--limit", "1M", "--no-wait")
            qedfs("defrag", place, "disk", "--pause")
            assert "in use by block job: defrag" in qedfs("defrag", place, "disk", check=False).stderr
            qedfs("defrag", place, "disk", "--cancel")
            mount_settled(mount)
            guest = threading.Thread(target=write)
            guest.start()
            try:
                shown = json.loads(qedfs("defrag", place, "disk", "--json").stdout)["images"][0]
            finally:
                done.set()
                guest.join()
            assert (shown["job"]["type"], shown["job"]["state"]) == ("defrag", "complete")
            assert read_direct(image, 0, 16 * MIB) == expected
            assert mount.unmount() == 0
        assert pieces(overlay) < 10
        assert qemu_check(overlay).corruptions == 0
        (tmp_path / "expected").write_bytes(expected)
        assert qemu_same(overlay, tmp_path / "expected")
        assert qemu_info(overlay)["virtual-size"] == 16 * MIB


def mount_settled(mount: Mount) -> None:
    """Wait until a job that was cancelled has ended."""
    with Client.connect(str(mount.mountpoint)) as client:
        while client.execute("query-block-jobs"):
            pass


def test_killed_in_the_middle_of_it_no_returned_write_is_lost(tmp_path: Path) -> None:
    with origin(tmp_path, 8 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url, "--cluster-size", "4K")
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            fill_at_random(mount.path("disk.raw"))
            assert mount.unmount() == 0
        expected = Path(shutil.copy(source.raw, tmp_path / "expected"))
        target = Overlay(overlay, expected, tmp_path / "mnt")
        for seed in range(2):
            kill_once(target, seed, "--no-stream", beside=Jobs("defrag").running)
