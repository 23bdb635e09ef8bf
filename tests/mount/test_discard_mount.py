"""TRIM, punched holes and zero ranges on a real mount, by the programs that use them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import first_difference, qemu_check, qemu_same
from tests.harness.mounts import Mount, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require, require_root

from .support import (
    CLUSTER_SIZE,
    KEEP_SIZE,
    MIB,
    PUNCH_HOLE,
    ZERO_RANGE,
    create,
    make_hole,
    mounted_over,
    opened,
    origin,
    read_direct,
)

SIZE = 8 * MIB + 1536  # the last cluster is not a whole one
SMALL_DISK = 320 * MIB  # the least that mkfs.xfs takes is 300 MiB
PUNCH, ZERO = "--punch-hole", "--zero-range"


def tool(*argv: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    require(str(argv[0]))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert not check or done.returncode == 0, (argv, done.stderr, done.stdout)
    return done


def fallocate(path: Path, mode: str, pos: int, size: int, *options: str) -> None:
    tool("fallocate", mode, *options, "--offset", str(pos), "--length", str(size), path)


class Disk:
    """An image that nobody streams, and what it must read as."""

    def __init__(self, mount: Mount, data: bytes) -> None:
        self.mount = mount
        self.path = mount.path("disk.raw")
        self.expected = bytearray(data)

    def make_zeros(self, mode: str, pos: int, size: int, *options: str) -> None:
        fallocate(self.path, mode, pos, size, *options)
        end = min(pos + size, len(self.expected))
        self.expected[pos:end] = bytes(max(0, end - pos))

    def check(self) -> None:
        assert self.path.read_bytes() == self.expected
        assert read_direct(self.path, 0, 8 * MIB) == self.expected[: 8 * MIB]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        yield Disk(mount, source.data())


@pytest.mark.parametrize(
    ("pos", "size"),
    [
        (0, CLUSTER_SIZE),
        (5, 10),
        (CLUSTER_SIZE - 3, 6),
        (100, 3 * CLUSTER_SIZE),
        (MIB, 2 * MIB),
        (SIZE - 100, 100),
        (SIZE - 2 * CLUSTER_SIZE, 2 * CLUSTER_SIZE),
    ],
)
@pytest.mark.parametrize("mode", [PUNCH, ZERO])
def test_a_range_reads_as_zeros_at_once_whatever_it_was(disk: Disk, mode: str, pos: int, size: int) -> None:
    """What the kernel has cached, what is in the overlay, and what is missing."""
    start = pos // CLUSTER_SIZE * CLUSTER_SIZE
    with opened(disk.path) as fd:
        os.pread(fd, 4096, pos)
        os.pwrite(fd, b"guest", start + 700)
        disk.expected[start + 700 : start + 705] = b"guest"
        disk.make_zeros(mode, pos, size)
        assert os.pread(fd, size, pos) == bytes(size)
    disk.check()


def test_what_is_discarded_is_not_fetched(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        path = mount.path("disk.raw")
        fallocate(path, PUNCH, 0, 7 * MIB)
        assert read_direct(path, 0, 7 * MIB) == bytes(7 * MIB)
        assert mount.image()["counters"]["discarded"] == 7 * MIB
        source.server.forget()
        stream(mount)
        mount.wait()
        assert source.server.body_bytes() <= SIZE - 7 * MIB + CLUSTER_SIZE
        with opened(path) as fd:
            assert os.lseek(fd, 0, os.SEEK_DATA) == 7 * MIB
    assert qemu_check(tmp_path / "disk.qed").corruptions == 0


def stream(mount: Mount) -> None:
    qedfs("stream", "start", mount.mountpoint)


def test_modes_that_cannot_be_honoured_are_refused(disk: Disk) -> None:
    """Mode 0: posix_fallocate of glibc writes instead, fallocate(1) says that it is not supported."""
    done = tool("fallocate", "--length", str(MIB), disk.path, check=False)
    assert (done.returncode, "not supported" in done.stderr) == (1, True)
    for mode in ("--collapse-range", "--insert-range"):
        done = tool("fallocate", mode, "--offset", "0", "--length", str(CLUSTER_SIZE), disk.path, check=False)
        assert done.returncode == 1
    with opened(disk.path) as fd:
        os.posix_fallocate(fd, 0, 3 * CLUSTER_SIZE)
    disk.check()


def test_the_end_of_the_image(disk: Disk) -> None:
    disk.make_zeros(PUNCH, SIZE - 10, MIB)
    disk.make_zeros(ZERO, SIZE - 20, MIB, "--keep-size")
    disk.make_zeros(PUNCH, SIZE + 5, MIB)
    done = tool("fallocate", ZERO, "--offset", str(SIZE - 10), "--length", "11", disk.path, check=False)
    assert os.strerror(errno.EFBIG) in done.stderr
    assert disk.path.stat().st_size == SIZE
    disk.check()


def test_an_image_that_takes_no_writes(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        create(tmp_path / "disk.qed", source.url)
        with mounted_over(tmp_path, source.url, "--no-stream", "--read-only") as mount:
            assert tool("fallocate", PUNCH, "--length", "4096", mount.path("disk.raw"), check=False).returncode == 1


def test_a_discard_survives_kill_9_and_the_next_mount(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            path = mount.path("disk.raw")
            with opened(path) as fd:
                os.pwrite(fd, b"x" * MIB, 0)
            fallocate(path, PUNCH, 0, 3 * MIB)
            with opened(path) as fd:
                os.pwrite(fd, b"y" * CLUSTER_SIZE, MIB)
            mount.kill()
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            expected = bytearray(source.data())
            expected[: 3 * MIB] = bytes(3 * MIB)
            expected[MIB : MIB + CLUSTER_SIZE] = b"y" * CLUSTER_SIZE
            assert mount.path("disk.raw").read_bytes() == expected
            assert mount.unmount() == 0
        assert qemu_check(tmp_path / "disk.qed").corruptions == 0


def test_space_comes_back(tmp_path: Path) -> None:
    """To the file system while it is mounted, and the file does not grow where there is room in it."""
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url) as mount:
        mount.wait()
        overlay, path = tmp_path / "disk.qed", mount.path("disk.raw")
        before = overlay.stat()
        fallocate(path, PUNCH, MIB, 4 * MIB)
        wait_for(lambda: overlay.stat().st_blocks * 512 < before.st_blocks * 512 - 3 * MIB, "space to come back")
        with opened(path) as fd:
            os.pwrite(fd, b"n" * 3 * MIB, MIB)
            os.fsync(fd)
        assert overlay.stat().st_size <= before.st_size
        expected = bytearray(source.data())
        expected[MIB : 5 * MIB] = b"n" * 3 * MIB + bytes(MIB)
        assert path.read_bytes() == expected
        assert mount.unmount() == 0
    assert qemu_check(overlay).corruptions == 0


def test_the_next_mount_gives_back_what_a_kill_has_leaked_and_check_other_leaks(tmp_path: Path) -> None:
    overlay = tmp_path / "disk.qed"
    extent_blocks = 8 * 4096  # of ext4, which splits an extent at each hole

    def taken() -> int:
        return overlay.stat().st_blocks * 512

    with origin(tmp_path, SIZE) as source:
        with mounted_over(tmp_path, source.url) as mount:
            mount.wait()
            fallocate(mount.path("disk.raw"), PUNCH, MIB, 4 * MIB)
            mount.kill()
        before = taken()
        with mounted_over(tmp_path, source.url) as mount:
            wait_for(lambda: taken() <= before - 4 * MIB + extent_blocks, "space to come back")
            assert mount.unmount() == 0
        with overlay.open("ab") as file:
            file.write(os.urandom(4 * MIB))
        assert qemu_check(overlay).leaks >= 64
        qedfs("check", "--repair", overlay)
        assert taken() <= before - 4 * MIB + extent_blocks
        assert qemu_check(overlay).corruptions == 0
        expected = bytearray(source.data())
        expected[MIB : 5 * MIB] = bytes(4 * MIB)
        (tmp_path / "expected").write_bytes(expected)
        assert qemu_same(overlay, tmp_path / "expected")


def random_operations(path: Path, copy: Path, count: int, seed: int) -> None:
    """Writes, holes, zero ranges and reads at any byte, as fsx does, on an image and on a plain file."""
    source = random.Random(seed)
    size = copy.stat().st_size
    with opened(path) as image, opened(copy) as model:
        for _ in range(count):
            length = min(source.choice((1, 511, 4096, 65536, 100_000, 300_000)), size)
            pos = source.randrange(size - length + 1)
            kind = source.randrange(4)
            if kind == 0:
                data = source.randbytes(length)
                os.pwrite(image, data, pos)
                os.pwrite(model, data, pos)
            elif kind == 1:
                assert os.pread(image, length, pos) == os.pread(model, length, pos)
            else:
                make_hole(image, pos, length, (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE)[kind - 2])
                os.pwrite(model, bytes(length), pos)
            if source.random() < 0.02:
                os.fsync(image)


@pytest.mark.parametrize(("seed", "count"), [(1, 1000), pytest.param(2, 20_000, marks=pytest.mark.slow)])
def test_random_operations_during_the_stream(tmp_path: Path, seed: int, count: int) -> None:
    with origin(tmp_path, SIZE, seed=seed) as source:
        copy = tmp_path / "copy"
        copy.write_bytes(source.data())
        with mounted_over(tmp_path, source.url, "--limit", "4M") as mount:
            random_operations(mount.path("disk.raw"), copy, count, seed)
            mount.wait()
            assert first_difference(mount.path("disk.raw"), copy) is None
            assert mount.unmount() == 0
        assert qemu_same(tmp_path / "disk.qed", copy)
        assert qemu_check(tmp_path / "disk.qed").corruptions == 0


# Consumers.


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    require_root()
    device = tool("losetup", "--find", "--show", "--direct-io=on", path).stdout.strip()
    try:
        yield Path(device)
    finally:
        tool("losetup", "--detach", device)


@contextlib.contextmanager
def file_system(device: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    tool("mount", device, folder)
    try:
        yield folder
    finally:
        tool("umount", folder)


def with_garbage(raw: Path, kind: str, used: int) -> None:
    """A file system with a file of `used` random bytes, on a disk whose free space is random bytes, too."""
    with raw.open("wb") as file:
        for _ in range(SMALL_DISK // MIB):
            file.write(os.urandom(MIB))
    tool(*(("mkfs.ext4", "-q", "-F", "-E", "nodiscard") if kind == "ext4" else ("mkfs.xfs", "-q", "-f", "-K")), raw)
    with loop_device(raw) as device, file_system(device, raw.with_suffix(".mnt")) as folder:
        (folder / "file").write_bytes(os.urandom(used))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_fstrim_shortens_the_download(tmp_path: Path, kind: str) -> None:
    used = 40 * MIB
    with origin(tmp_path, MIB) as source:
        with_garbage(source.raw, kind, used)
        with mounted_over(tmp_path, source.url, "--limit", "16M") as mount:
            path = mount.path("disk.raw")
            with loop_device(path) as device, file_system(device, tmp_path / "fs") as folder:
                tool("fstrim", folder)
                found = os.statvfs(folder)
                fetched = source.server.body_bytes()
                content = (folder / "file").read_bytes()
            stream(mount)
            mount.wait()
            counters = mount.image()["counters"]
            assert len(content) == used
            assert counters["discarded"] > 200 * MIB
            # What is not free holds the metadata, too, and the log of XFS.
            used_part = SMALL_DISK - found.f_bfree * found.f_frsize
            assert source.server.body_bytes() < used_part * 1.05 + fetched
            assert mount.unmount() == 0
        assert qemu_check(tmp_path / "disk.qed").corruptions == 0


def test_blkdiscard_of_a_loop_device(disk: Disk) -> None:
    with loop_device(disk.path) as device:
        tool("blkdiscard", "--offset", str(MIB), "--length", str(2 * MIB), device)
        tool("blkdiscard", "--zeroout", "--offset", str(5 * MIB), "--length", str(MIB), device)
    for pos, size in ((MIB, 2 * MIB), (5 * MIB, MIB)):
        disk.expected[pos : pos + size] = bytes(size)
    disk.check()
    # The kernel has read a little of a new device.
    assert disk.mount.image()["counters"]["discarded"] > 2 * MIB


def test_programs_copy_holes_as_holes(disk: Disk, tmp_path: Path) -> None:
    disk.make_zeros(PUNCH, MIB, 4 * MIB)
    copy = tmp_path / "copy"
    tool("cp", "--sparse=auto", disk.path, copy)
    assert copy.stat().st_blocks * 512 < SIZE - 3 * MIB
    assert copy.read_bytes() == disk.expected
    tool("rsync", "--sparse", disk.path, tmp_path / "synced")
    assert (tmp_path / "synced").stat().st_blocks * 512 < SIZE - 3 * MIB
    assert (tmp_path / "synced").read_bytes() == disk.expected
    tool("tar", "-C", disk.mount.mountpoint, "-Scf", tmp_path / "copy.tar", "disk.raw")
    assert (tmp_path / "copy.tar").stat().st_size < SIZE - 3 * MIB
    (tmp_path / "out").mkdir()
    tool("tar", "-C", tmp_path / "out", "-xf", tmp_path / "copy.tar")
    assert (tmp_path / "out/disk.raw").read_bytes() == disk.expected
    found = json.loads(tool("qemu-img", "map", "-f", "raw", "--output=json", disk.path).stdout)
    assert [(part["start"], part["length"]) for part in found if part["zero"]] == [(MIB, 4 * MIB)]
    tool("qemu-img", "convert", "-f", "raw", "-O", "raw", disk.path, tmp_path / "converted")
    assert (tmp_path / "converted").read_bytes()[:SIZE] == disk.expected


def test_qemu_discards_and_writes_zeros(disk: Disk) -> None:
    argv = ["qemu-io", "-f", "raw", "--discard=unmap", "-c", "discard 1M 1M", "-c", "write -z 3M 64k"]
    tool(*argv, "-c", "write -z -u 4M 1M", disk.path)
    for pos, size in ((MIB, MIB), (3 * MIB, CLUSTER_SIZE), (4 * MIB, MIB)):
        disk.expected[pos : pos + size] = bytes(size)
    disk.check()
    assert disk.mount.image()["counters"]["discarded"] == 2 * MIB + CLUSTER_SIZE


def test_xfs_io(disk: Disk) -> None:
    require("xfs_io")
    tool("xfs_io", "-c", "fpunch 1m 1m", "-c", "fzero 3m 1m", disk.path)
    for pos in (MIB, 3 * MIB):
        disk.expected[pos : pos + MIB] = bytes(MIB)
    disk.check()


def test_mkfs_discards_first(tmp_path: Path) -> None:
    with origin(tmp_path, 64 * MIB) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        tool("mkfs.ext4", "-q", "-F", mount.path("disk.raw"))
        assert mount.image()["counters"]["discarded"] > 50 * MIB
        tool("e2fsck", "-fn", mount.path("disk.raw"))
