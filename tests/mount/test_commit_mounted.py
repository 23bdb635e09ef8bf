"""A commit of a mounted image into its backing: beside a guest, by commands, and killed in the middle of it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from qedfs.control.qmp.client import Client
from qedfs.errors import InUse
from tests.harness.images import qemu_check, qemu_same, random_image
from tests.harness.mounts import Mount, qedfs

from .kills import Overlay, kill_once
from .kills_beside import Jobs
from .support import MIB, Writer, assert_same, create, mounted_over, opened

SIZE = 16 * MIB
BASE_SIZE = 10 * MIB  # it grows


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A raw backing, shorter than the image."""
    return random_image(tmp_path / "base.raw", BASE_SIZE, seed=1)


def expected_of(base: Path) -> Path:
    """What the image reads as at first."""
    expected = Path(shutil.copy(base, base.with_name("expected")))
    os.truncate(expected, SIZE)
    return expected


def write_both(image: Path, expected: Path, count: int, seed: int) -> None:
    writer = Writer(SIZE, seed=seed)
    with opened(image) as fd, opened(expected) as other:
        for _ in range(count):
            pos, data = writer.next()
            os.pwrite(fd, data, pos)
            os.pwrite(other, data, pos)
        os.fsync(fd)


def local(overlay: Path) -> int:
    """Bytes that the overlay has."""
    found: int = json.loads(qedfs("info", overlay, "--json").stdout)["populated"]
    return found


def test_the_backing_has_all_of_it_and_the_overlay_what_a_guest_has_written_meanwhile(
    tmp_path: Path, base: Path
) -> None:
    overlay, expected = create(tmp_path / "disk.qed", str(base), "--size", str(SIZE)), expected_of(base)
    with mounted_over(tmp_path, str(base), "--no-stream", "--allow-backing", tmp_path) as mount:
        image, place = mount.path("disk.raw"), mount.mountpoint
        write_both(image, expected, 100, 2)
        with opened(base, os.O_RDONLY):
            refused = qedfs("commit", place, "disk", check=False)
        assert (refused.returncode, "another program has it open" in refused.stderr) == (InUse.exit_code, True)
        assert_same(image, expected)
        ended = threading.Event()

        def write() -> None:
            for seed in range(3, 10_000):
                write_both(image, expected, 5, seed)
                if ended.is_set():
                    return

        guest = threading.Thread(target=write)
        guest.start()
        try:
            qedfs("commit", place, "disk", "--limit", "8M", "--no-wait")
            qedfs("commit", place, "disk", "--pause")
            assert "in use by block job: commit" in qedfs("commit", place, "disk", check=False).stderr
            qedfs("commit", place, "disk", "--cancel")
            settle(mount)
            shown = json.loads(qedfs("commit", place, "disk", "--json").stdout)["images"][0]
        finally:
            ended.set()
            guest.join()
        assert (shown["job"]["type"], shown["job"]["state"]) == ("commit", "complete")
        assert_same(image, expected)
        assert qedfs("commit", place, "disk").stdout == "disk.raw: the backing has its data\n"
        assert_same(base, expected)
        assert_same(image, expected)
        assert mount.unmount() == 0
    assert qemu_check(overlay).corruptions == 0
    assert qemu_same(overlay, expected)
    assert local(overlay) == 0


def settle(mount: Mount) -> None:
    """Wait until a job that was cancelled has ended."""
    with Client.connect(str(mount.mountpoint)) as client:
        while client.execute("query-block-jobs"):
            pass


def test_killed_in_the_middle_of_it_no_returned_write_is_lost(tmp_path: Path, base: Path) -> None:
    overlay = create(tmp_path / "disk.qed", str(base), "--size", str(SIZE), "--cluster-size", "4K")
    allow = "--allow-backing", str(tmp_path)
    target = Overlay(overlay, expected_of(base), tmp_path / "mnt")
    for seed in range(2):
        kill_once(target, seed, "--no-stream", *allow, beside=Jobs("commit").running, again=allow)
    with mounted_over(tmp_path, str(base), "--no-stream", *allow) as mount:
        qedfs("commit", mount.mountpoint, "disk")
        assert mount.unmount() == 0
    assert_same(base, target.expected)
