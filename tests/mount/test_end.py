"""The end of a mount takes away what is its own, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.mount.place import standing_at
from tests.harness.process import wait_for
from tests.harness.require import require, require_root, unavailable
from tests.mount.support import MIB, mounted_over, origin


def test_what_was_mounted_in_its_place_stays(tmp_path: Path) -> None:
    require_root()
    with origin(tmp_path, MIB) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        # Holds the detached file system, so that its server serves on.
        with _held(mount.path("disk.raw")) as fd:
            _run("umount", "-l", mount.mountpoint)
            with _tmpfs(mount.mountpoint):
                os.pwrite(fd, b"late", 0)
                os.kill(mount.pid, signal.SIGTERM)
                assert mount.wait_exit(20) == 0
                assert _kind_at(mount.mountpoint) == "tmpfs"
        assert "another file system is mounted there now; it is left alone" in mount.output()


def test_what_was_mounted_over_it_stays(tmp_path: Path) -> None:
    require_root()
    with (
        origin(tmp_path, MIB) as source,
        mounted_over(tmp_path, source.url, "--no-stream") as mount,
        _tmpfs(mount.mountpoint),
    ):
        os.kill(mount.pid, signal.SIGTERM)
        assert mount.wait_exit(20) == 0
        assert _kind_at(mount.mountpoint) == "tmpfs"


@pytest.mark.parametrize("way", ["fusectl", "umount -f"])
def test_a_mount_whose_connection_was_cut_is_taken_away(tmp_path: Path, way: str) -> None:
    require_root()
    with origin(tmp_path, MIB) as source:
        with mounted_over(tmp_path, source.url, "--no-stream") as mount, _held(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"late", 0)
            if way == "fusectl":
                _abort(mount.mountpoint)
            else:
                done = subprocess.run([require("umount"), "-f", mount.mountpoint], check=False, timeout=20)
                assert done.returncode != 0
            assert mount.wait_exit(20) == 1
            assert _kind_at(mount.mountpoint) is None
            assert mount.output().count("its connection to the kernel was cut") == 1
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            assert mount.path("disk.raw").read_bytes() == b"late" + source.data()[4:]


def test_a_forced_unmount_that_succeeds_is_a_good_end(tmp_path: Path) -> None:
    require_root()
    with origin(tmp_path, MIB) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        wait_for(lambda: "serving" in mount.output(), "the end of the start")
        _run("umount", "-f", mount.mountpoint)
        assert mount.wait_exit(20) == 0


def _abort(mountpoint: Path) -> None:
    standing = standing_at(str(mountpoint))
    assert standing is not None
    abort = Path("/sys/fs/fuse/connections", standing.device.split(":")[1], "abort")
    if not abort.exists():
        unavailable("needs fusectl at /sys/fs/fuse/connections")
    abort.write_text("1")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int]:
    """A descriptor whose file system may end before it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        # ENOTCONN: the descriptor is closed all the same.
        with contextlib.suppress(OSError):
            os.close(fd)


def _kind_at(place: Path) -> str | None:
    standing = standing_at(str(place))
    return None if standing is None else standing.kind


@contextlib.contextmanager
def _tmpfs(place: Path) -> Iterator[None]:
    _run("mount", "-t", "tmpfs", "tmpfs", place)
    try:
        yield
    finally:
        _run("umount", "-l", place)


def _run(command: str, *arguments: str | Path) -> None:
    subprocess.run([require(command), *arguments], check=True, timeout=20)
