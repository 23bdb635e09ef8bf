"""A commit of a mounted image into a backing whose own file system is full, or frozen. Needs root."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import QEDFS, wait_for
from tests.harness.require import require

from .support import MIB, assert_same, create, opened
from .test_commit_mounted import settle
from .test_discard_mount import file_system, loop_device, tool

SIZE = 8 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own, with the backing base.raw, which is a hole."""
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(48 * MIB)
    tool("mkfs.ext4", "-q", "-F", "-m", "0", tmp_path / "disk")
    with loop_device(tmp_path / "disk") as device, file_system(device, tmp_path / "below") as below:
        (below / "base.raw").write_bytes(b"")
        os.truncate(below / "base.raw", SIZE)
        yield below


def fill(mount: Mount, expected: Path) -> None:
    with opened(mount.path("disk.raw")) as fd:
        os.pwrite(fd, expected.read_bytes(), 0)
        os.fsync(fd)


@contextlib.contextmanager
def served(tmp_path: Path, disk: Path) -> Iterator[tuple[Mount, Path]]:
    """An image full of data over the backing, beside another one; and a copy of what it reads as."""
    folder, expected = tmp_path / "overlays", tmp_path / "expected"
    folder.mkdir()
    create(folder / "disk.qed", str(disk / "base.raw"))
    qedfs("create", folder / "other.qed", "--size", "1M")
    expected.write_bytes(os.urandom(SIZE))
    with mounted(folder, tmp_path / "mnt", "--no-stream", "--allow-backing", str(disk)) as mount:
        fill(mount, expected)
        yield mount, expected
        assert_same(mount.path("disk.raw"), expected)
        qedfs("commit", mount.mountpoint, "disk")
        assert_same(mount.path("disk.raw"), expected)
        assert mount.unmount() == 0
    assert_same(disk / "base.raw", expected)


def job(mount: Mount) -> dict[str, str]:
    found: dict[str, str] = mount.image("disk.raw")["job"]
    return found


def await_job(mount: Mount, state: str) -> None:
    wait_for(lambda: job(mount)["state"] == state, f"job that is {state}")


def test_it_waits_for_room_on_the_disk_of_the_backing(tmp_path: Path, disk: Path) -> None:
    with served(tmp_path, disk) as (mount, expected):
        free = os.statvfs(disk)
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 3 * MIB)
        qedfs("commit", mount.mountpoint, "disk", "--no-wait")
        await_job(mount, "paused")
        assert "base.raw: the file system is full" in job(mount)["reason"]
        assert_same(mount.path("disk.raw"), expected)
        qedfs("commit", mount.mountpoint, "disk", "--cancel")
        ballast.unlink()


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    program = require("fsfreeze")
    subprocess.run([program, "--freeze", folder], check=True, timeout=HANG_SECONDS)
    try:
        yield
    finally:
        subprocess.run([program, "--unfreeze", folder], check=True, timeout=HANG_SECONDS)


def test_a_frozen_backing_is_told_and_costs_nobody_else_anything(tmp_path: Path, disk: Path) -> None:
    with served(tmp_path, disk) as (mount, expected), contextlib.ExitStack() as stack:
        qedfs("commit", mount.mountpoint, "disk", "--no-wait", "--limit", "1M")
        stack.enter_context(frozen(disk))
        await_job(mount, "waiting")
        assert re.search("the file system of the backing .*base.raw does not answer", job(mount)["reason"])
        done = qedfs("commit", mount.mountpoint, "disk", "--cancel")
        assert re.search("disk.raw: the commit ends later: the file system of the backing", done.stderr)
        with opened(mount.path("other.raw")) as fd:
            os.pwrite(fd, b"other", 0)
            os.fsync(fd)
        with opened(mount.path("disk.raw")) as fd, expected.open("r+b") as same:
            for file in (fd, same.fileno()):
                os.pwrite(file, b"while it is frozen", MIB)
            os.fsync(fd)
        stack.close()
        settle(mount)


@pytest.mark.slow  # 15 s of waits
def test_the_end_of_a_mount_waits_for_a_frozen_backing_and_says_so(tmp_path: Path, disk: Path) -> None:
    overlay, expected = create(tmp_path / "disk.qed", str(disk / "base.raw")), tmp_path / "expected"
    expected.write_bytes(os.urandom(SIZE))
    with mounted(overlay, tmp_path / "mnt", "--no-stream", "--allow-backing", str(disk)) as mount:
        fill(mount, expected)
        qedfs("commit", mount.mountpoint, "disk", "--no-wait", "--limit", "1M")
        with frozen(disk):
            await_job(mount, "waiting")
            said = (tmp_path / "said").open("w+")
            umount = subprocess.Popen([*QEDFS, "umount", mount.mountpoint], stderr=said)
            wait_for(lambda: "\n" in (tmp_path / "said").read_text(), "word of umount")
            assert umount.poll() is None
        assert umount.wait(HANG_SECONDS) == 0
        said.close()
        assert "for which a disk, or a frozen file system, does not answer" in (tmp_path / "said").read_text()
    with mounted(overlay, tmp_path / "again", "--no-stream", "--allow-backing", str(disk)) as mount:
        assert_same(mount.path("disk.raw"), expected)
        qedfs("commit", mount.mountpoint, "disk")
        assert mount.unmount() == 0
    assert_same(disk / "base.raw", expected)
