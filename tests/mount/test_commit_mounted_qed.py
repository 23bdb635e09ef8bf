"""A commit of a mounted image into the QED image that it is over: beside a guest, killed in the middle, and refused."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from qedfs.errors import InUse
from tests.harness.images import qemu_check, qemu_same, random_image
from tests.harness.mounts import qedfs
from tests.source.qcow2.support import qemu_img

from .kills import Overlay, kill_once
from .kills_beside import Jobs
from .support import MIB, assert_same, create, mounted_over
from .test_commit_mounted import local, write_both

SIZE = 16 * MIB
BASE_SIZE = 10 * MIB  # it grows


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """What the image reads as at first."""
    return random_image(tmp_path / "expected", BASE_SIZE, seed=1)


@pytest.fixture
def base(tmp_path: Path, raw: Path) -> Path:
    """The same as a QED image, shorter than the image."""
    path = tmp_path / "base"
    qemu_img("convert", "-f", "raw", "-O", "qed", raw, path)
    os.truncate(raw, SIZE)
    return path


def test_the_backing_has_all_of_it_while_a_guest_goes_on(tmp_path: Path, base: Path, raw: Path) -> None:
    overlay = create(tmp_path / "disk.qed", str(base), "--size", str(SIZE))
    with mounted_over(tmp_path, str(base), "--no-stream", "--allow-backing", tmp_path) as mount:
        image, place = mount.path("disk.raw"), mount.mountpoint
        write_both(image, raw, 100, 2)
        with base.open("rb"):
            refused = qedfs("commit", place, "disk", check=False)
        assert (refused.returncode, "another program has it open" in refused.stderr) == (InUse.exit_code, True)
        assert_same(image, raw)
        ended = threading.Event()

        def write() -> None:
            for seed in range(3, 10_000):
                write_both(image, raw, 5, seed)
                if ended.is_set():
                    return

        guest = threading.Thread(target=write)
        guest.start()
        try:
            qedfs("commit", place, "disk")
        finally:
            ended.set()
            guest.join()
        assert_same(image, raw)
        assert qedfs("commit", place, "disk").stdout == "disk.raw: the backing has its data\n"
        assert qemu_same(base, raw, fmt="qed")
        assert_same(image, raw)
        write_both(image, raw, 5, 1)
        assert mount.unmount() == 0
    assert (qemu_check(overlay).corruptions, qemu_check(base, "qed").corruptions) == (0, 0)
    assert qemu_same(overlay, raw)
    assert 0 < local(overlay) < 5 * MIB
    # The pin has followed: the next mount, and the command without a mount, take the backing for what it is.
    with mounted_over(tmp_path, str(base), "--no-stream", "--allow-backing", tmp_path) as mount:
        assert_same(mount.path("disk.raw"), raw)
        assert mount.unmount() == 0
    qedfs("commit", overlay, "--allow-backing", tmp_path)
    with mounted_over(tmp_path, str(base), "--no-stream", "--allow-backing", tmp_path) as mount:
        assert_same(mount.path("disk.raw"), raw)
        assert mount.unmount() == 0
    os.utime(base)
    refused = qedfs("commit", overlay, "--allow-backing", tmp_path, check=False)
    assert (refused.returncode, "is not the version that" in refused.stderr) == (5, True)


def test_killed_in_the_middle_of_it_no_returned_write_is_lost(tmp_path: Path, base: Path, raw: Path) -> None:
    overlay = create(tmp_path / "disk.qed", str(base), "--size", str(SIZE), "--cluster-size", "4K")
    allow = "--allow-backing", str(tmp_path)
    target = Overlay(overlay, Path(shutil.copy(raw, raw.with_name("wanted"))), tmp_path / "mnt")
    for seed in range(2):
        kill_once(target, seed, "--no-stream", *allow, beside=Jobs("commit").running, again=allow)
    with mounted_over(tmp_path, str(base), "--no-stream", *allow) as mount:
        qedfs("commit", mount.mountpoint, "disk")
        assert mount.unmount() == 0
    assert qemu_same(base, target.expected, fmt="qed")
    assert qemu_check(base, "qed").corruptions == 0
