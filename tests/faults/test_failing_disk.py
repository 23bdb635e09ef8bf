"""A disk fails one write and is well again: what the kernel goes on showing is not what the disk has.

On real ext4, XFS and btrfs. The write-back of one page fails; Linux tells that once, keeps the page and calls it clean.
What counts is what is left when the page cache is gone, as after a reboot: `forget_cache`.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import time
from pathlib import Path

import pytest

from qedfs.format.header import HEADER_BYTES, UNTOUCHED, decode_header
from qedfs.mount.rounds import ROUND_SECONDS
from qedfs.overlay.create import create_overlay
from tests.faults.test_barrier import assert_told_at_the_end
from tests.harness.failing_disk import FailingDisk, failing_disk
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import first_difference, qemu_check, random_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require
from tests.mount.outlives import kill_server

MIB = 1 << 20
SIZE = 8 * MIB
CLUSTER = 1 << 16
# The others behave as ext4 does, seen from here: each of them once in the default run.
KINDS = ("ext4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("xfs", "btrfs")))
DISK_BYTES = {"ext4": 128 * MIB, "xfs": 384 * MIB, "btrfs": 256 * MIB}


def new_overlay(disk: FailingDisk, backing: Path) -> Path:
    """An overlay on the disk."""
    overlay = disk.folder / "disk.qed"
    create_overlay(str(overlay), image_size=SIZE, backing=str(backing))
    return overlay


def pattern_of(what: str, overlay: Path, backing: Path) -> bytes:
    """What a stream of the new overlay will write where the disk is to fail."""
    header = decode_header(overlay.read_bytes()[:HEADER_BYTES], overlay.stat().st_size)
    if what == "data":
        return backing.read_bytes()[5 * CLUSTER : 5 * CLUSTER + 64]
    if what == "header":  # the one without a backing
        return dataclasses.replace(header.without_backing(), autoclear_features=UNTOUCHED).encode()
    table = header.l1_table_offset + header.geometry.table_bytes
    data = table + header.geometry.table_bytes
    return struct.pack("<QQ", data + 4 * CLUSTER, data + 5 * CLUSTER)  # clusters that lie in a row


def raw(overlay: Path, folder: Path) -> Path:
    """The image as QEMU reads it."""
    made = folder / "converted.raw"
    subprocess.run(
        [require("qemu-img"), "convert", "-f", "qed", "-O", "raw", overlay, made], check=True, timeout=HANG_SECONDS
    )
    return made


def failed_stream(disk: FailingDisk, overlay: Path, mountpoint: Path, pattern: bytes, *options: str | Path) -> None:
    """Stream until a page of the table could not be written."""
    disk.fail_writes(pattern)
    with mounted(overlay, mountpoint, *options) as mount:
        wait_for(lambda: mount.image()["state"] == "failed", "the failed barrier")
        assert disk.failures_left == 0
        assert_told_at_the_end(mount)


@pytest.mark.parametrize(
    ("kind", "what"),
    [("ext4", "table"), ("ext4", "data"), ("ext4", "header"), ("xfs", "table"), ("btrfs", "table")]
    + [pytest.param(kind, what, marks=pytest.mark.slow) for kind in ("xfs", "btrfs") for what in ("data", "header")],
)
def test_complete_is_said_over_what_the_disk_has(tmp_path: Path, kind: str, what: str) -> None:
    """A page is lost, the overlay is mounted again as the log advises, the stream ends, the source is deleted."""
    backing = random_image(tmp_path / "backing.raw", SIZE)
    expected = tmp_path / "expected.raw"
    expected.write_bytes(backing.read_bytes())
    with failing_disk(tmp_path / "fs", kind, DISK_BYTES[kind]) as disk:
        overlay = new_overlay(disk, backing)
        options = ("--allow-backing", backing)
        failed_stream(disk, overlay, tmp_path / "mnt", pattern_of(what, overlay, backing), *options)
        with mounted(overlay, tmp_path / "mnt", *options) as mount:
            mount.wait()
            assert mount.unmount() == 0
        backing.unlink()
        disk.forget_cache()
        assert qemu_check(overlay).corruptions == 0
        assert first_difference(raw(overlay, tmp_path), expected) is None


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_opens_the_overlay_next_reads_the_disk(tmp_path: Path, kind: str) -> None:
    """The end of the mount leaves nothing in the page cache that the disk lacks: not for QEMU either."""
    backing = random_image(tmp_path / "backing.raw", SIZE)
    with failing_disk(tmp_path / "fs", kind, DISK_BYTES[kind]) as disk:
        overlay = new_overlay(disk, backing)
        failed_stream(
            disk, overlay, tmp_path / "mnt", pattern_of("table", overlay, backing), "--allow-backing", backing
        )
        shown = overlay.read_bytes()
        disk.forget_cache()
        assert overlay.read_bytes() == shown


def killed_before_writeback(disk: FailingDisk, overlay: Path, mountpoint: Path, *options: str | Path) -> None:
    """A mount is killed after it has answered a write, which the disk does not take after that."""
    with mounted(overlay, mountpoint, *options) as mount:
        write(mount, MIB, b"flushed!", sync=True)
        write(mount, 2 * MIB, b"answered", sync=False)
        disk.fail_writes(b"answered")
        mount.kill()
    os.sync()  # which is told of it, and does not use up the report of the file


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_between_the_error_and_its_report(tmp_path: Path, kind: str) -> None:
    """The kernel cannot write a guest's data after the kill: the next mount says so, and shows what the disk has."""
    backing = random_image(tmp_path / "backing.raw", SIZE)
    options = ("--no-stream", "--allow-backing", backing)
    with failing_disk(tmp_path / "fs", kind, DISK_BYTES[kind]) as disk:
        overlay = new_overlay(disk, backing)
        killed_before_writeback(disk, overlay, tmp_path / "mnt", *options)
        while disk.failures_left:  # on a busy machine, a commit has written the bytes before the disk was to fail
            disk.fail_writes(b"answered", times=0)
            overlay.unlink()
            killed_before_writeback(disk, new_overlay(disk, backing), tmp_path / "mnt", *options)
        refused = qedfs("mount", overlay, tmp_path / "mnt", *options, check=False)
        assert refused.returncode == 1
        assert "not flushed, are lost" in refused.stderr
        with mounted(overlay, tmp_path / "mnt", *options) as mount:
            found = mount.path("disk.raw").read_bytes()
            assert mount.unmount() == 0
        content = backing.read_bytes()
        assert found == content[:MIB] + b"flushed!" + content[MIB + 8 :]
        disk.forget_cache()
        assert qemu_check(overlay).corruptions == 0


@pytest.mark.parametrize("how", ["kill", "upgrade"])
def test_a_failed_barrier_stays_one_for_the_next_server(tmp_path: Path, how: str) -> None:
    """It opens the overlay anew, and its own barriers say nothing of what was lost before."""
    backing = random_image(tmp_path / "backing.raw", SIZE)
    with failing_disk(tmp_path / "fs", "ext4", DISK_BYTES["ext4"]) as disk:
        overlay = new_overlay(disk, backing)
        options = ("--no-stream", "--restart", "--allow-backing", backing)
        with mounted(overlay, tmp_path / "mnt", *options) as mount:
            fd = os.open(mount.path("disk.raw"), os.O_RDWR | os.O_CLOEXEC)
            disk.fail_writes(b"answered")
            os.pwrite(fd, b"answered", 2 * MIB)
            wait_for(lambda: mount.image()["condition"], "the failed barrier")
            time.sleep(2 * ROUND_SECONDS)  # the holder is told once in a round
            if how == "kill":
                kill_server(mount)
            else:
                qedfs("upgrade", mount.mountpoint)
            with pytest.raises(OSError, match="Read-only"):
                os.fsync(fd)
            (condition,) = mount.image()["condition"]
            assert condition["cause"] == "barrier-failed"
            os.close(fd)
            assert_told_at_the_end(mount)


def write(mount: Mount, pos: int, data: bytes, *, sync: bool) -> None:
    with mount.path("disk.raw").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, pos)
        if sync:
            os.fsync(file.fileno())
