"""A barrier that fails makes the overlay read-only until it is opened again: the kernel may have dropped the pages.

Linux marks pages clean whose write-back failed, so that a second fdatasync that succeeds would prove nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.overlay.create import create_overlay
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import first_difference, qemu_check, random_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import Child, wait_for
from tests.harness.require import require, require_root
from tests.mount.support import CLUSTER_SIZE, MIB

SIZE = 4 * MIB


@contextlib.contextmanager
def broken_barriers(mount: Mount, log: Path) -> Iterator[None]:
    """Every fdatasync of the process that serves the mount fails with EIO, by strace, while the block lasts."""
    argv = [require("strace"), "-f", "-p", str(mount.pid), "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO"]
    tracer = Child(argv, log)
    try:
        tracer.wait_until(lambda: "attached" in tracer.output(), "strace attached")
        yield
    finally:
        tracer.stop()


def _write_error(fd: int, pos: int) -> int | None:
    """The errno of a write of a cluster, None if it returned."""
    try:
        os.pwrite(fd, b"later" * (CLUSTER_SIZE // 5), pos)
    except OSError as exc:
        return exc.errno
    return None


def _fsync_error(fd: int) -> int | None:
    try:
        os.fsync(fd)
    except OSError as exc:
        return exc.errno
    return None


def assert_told_at_the_end(mount: Mount) -> None:
    """Whoever unmounts hears of what may be lost, and so does whoever waits for the process, as a service manager."""
    done = qedfs("umount", mount.mountpoint, check=False)
    assert done.returncode == 1
    assert re.search(r"disk\.qed: cannot sync: .*writes since its last flush may be lost", done.stderr)
    assert mount.wait_exit() == 1
    assert "may be lost" in mount.output().splitlines()[-1]


@pytest.mark.parametrize("at", [MIB, 100], ids=["new cluster", "in place"])
def test_a_failed_barrier(at: int, tmp_path: Path) -> None:
    require_root()
    backing = random_image(tmp_path / "backing.raw", SIZE)
    expected = bytearray(backing.read_bytes())
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=SIZE, backing=str(backing))
    options = ("--allow-backing", backing)
    with mounted(overlay, tmp_path / "mnt", "--no-stream", *options) as mount:
        path = mount.path("disk.raw")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(fd, b"synced", 10)
            os.fsync(fd)
            with broken_barriers(mount, tmp_path / "strace"):
                os.pwrite(fd, b"returned", at)
                assert _fsync_error(fd) in (errno.EIO, errno.EROFS)
            expected[10:16] = b"synced"
            # The disk is well again; that proves nothing about what was lost.
            assert _fsync_error(fd) in (errno.EIO, errno.EROFS)
            assert _write_error(fd, 2 * MIB) == errno.EROFS
            assert _write_error(fd, 0) == errno.EROFS  # in place
        finally:
            os.close(fd)
        # What was written without a flush is there or not, as after a power cut; all else is as it was.
        shown = path.read_bytes()
        assert shown[at : at + 8] in (b"returned", expected[at : at + 8])
        assert shown[:at] + shown[at + 8 :] == expected[:at] + expected[at + 8 :]
        with pytest.raises(OSError, match="Read-only"):
            path.open("r+b")
        image = mount.image()
        assert image["read_only"] is True
        assert "sync" in image["error"]
        assert "read-only until it is opened again" in image["error"]
        assert "read-only until it is opened again" in mount.output()
        assert_told_at_the_end(mount)
    with mounted(overlay, tmp_path / "mnt", *options) as mount:
        with mount.path("disk.raw").open("r+b", buffering=0) as image_file:
            image_file.write(b"again")
            os.fsync(image_file.fileno())
        expected[:5] = b"again"
        wait_for(lambda: mount.image()["state"] == "complete", "the end of the stream")
        assert mount.unmount() == 0
    assert qemu_check(overlay).corruptions == 0
    final = tmp_path / "final"
    subprocess.run(
        [require("qemu-img"), "convert", "-f", "qed", "-O", "raw", overlay, final], check=True, timeout=HANG_SECONDS
    )
    # The write whose fsync has failed is there or not; around it is what was there before.
    found = bytearray(final.read_bytes())
    assert bytes(found[at : at + 8]) in (b"returned", bytes(expected[at : at + 8]))
    found[at : at + 8] = expected[at : at + 8]
    assert found == expected


def test_the_stream_stops_and_readers_go_on(tmp_path: Path) -> None:
    require_root()
    backing = random_image(tmp_path / "backing.raw", SIZE)
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=SIZE, backing=str(backing))
    with mounted(overlay, tmp_path / "mnt", "--allow-backing", backing, "--limit", "256K") as mount:
        wait_for(lambda: mount.image()["populated"] > 0, "the stream")
        with broken_barriers(mount, tmp_path / "strace"):
            # The entries of what has been streamed are committed in some seconds, without anybody's asking.
            wait_for(lambda: bool(mount.image()["read_only"]), "the failed barrier")
        wait_for(lambda: mount.image()["state"] == "failed", "the end of the stream")
        assert first_difference(mount.path("disk.raw"), backing) is None
        assert_told_at_the_end(mount)
    assert qemu_check(overlay).corruptions == 0


def test_an_overlay_that_has_left_the_folder_is_told_of_at_the_end(tmp_path: Path) -> None:
    """It is closed, and its barrier fails, long before the mount ends; nobody hears of it then but the log."""
    require_root()
    folder = tmp_path / "folder"
    folder.mkdir()
    overlay = folder / "disk.qed"
    create_overlay(str(overlay), image_size=SIZE, backing=None)
    with mounted(folder, tmp_path / "mnt") as mount:
        wait_for(mount.path("disk.raw").exists, "the image")
        with broken_barriers(mount, tmp_path / "strace"):
            with mount.path("disk.raw").open("r+b", buffering=0) as image:
                image.write(b"answered")
            overlay.rename(tmp_path / "disk.qed")
            wait_for(lambda: "may be lost" in mount.output(), "the failed barrier")
        assert_told_at_the_end(mount)
