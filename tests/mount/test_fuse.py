"""The mounted image as a file: what every program may do with it, and the errno of what it may not."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import ext4_image, qemu_create, qemu_io, random_image
from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for
from tests.harness.require import require, require_root
from tests.harness.servers import nginx

from .support import CLUSTER_SIZE, MIB, create, mounted_over, opened, origin, read_direct, write_direct

# A multiple of the sector (the format asks for it), not of the page.
SIZE = 8 * MIB + 1536


class Disk:
    """One mount for the whole module, and what its image must read as: tests write to both."""

    def __init__(self, mount: Mount, overlay: Path, data: bytes) -> None:
        self.mount = mount
        self.overlay = overlay
        self.path = mount.path("disk.raw")
        self.expected = bytearray(data)

    def write(self, pos: int, data: bytes) -> int:
        """Writes through the mount, and notes what has become of it."""
        with opened(self.path) as fd:
            count = os.pwrite(fd, data, pos)
        self.expected[pos : pos + count] = data[:count]
        return count


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    with origin(folder, SIZE) as source:
        overlay = create(folder / "disk.qed", source.url)
        overlay.chmod(0o640)
        # No stream: what a test reads first is missing.
        with mounted(overlay, folder / "mnt", "--no-stream") as mount:
            yield Disk(mount, overlay, source.data())


def test_the_folder_shows_the_image(disk: Disk) -> None:
    assert os.listdir(disk.mount.mountpoint) == ["disk.raw"]


def test_attributes_are_those_of_the_overlay(disk: Disk) -> None:
    image, overlay = disk.path.stat(), disk.overlay.stat()
    assert stat.S_ISREG(image.st_mode)
    assert image.st_size == SIZE
    assert stat.S_IMODE(image.st_mode) == 0o640
    assert (image.st_uid, image.st_gid) == (overlay.st_uid, overlay.st_gid)
    assert image.st_nlink == 1


def test_blocks_are_what_the_overlay_takes(disk: Disk) -> None:
    read_direct(disk.path, 6 * MIB, MIB)
    # The kernel may hold the attributes for a moment.
    wait_for(lambda: disk.path.stat().st_blocks >= MIB // 512, "blocks of what was read")
    assert disk.path.stat().st_blocks == disk.overlay.stat().st_blocks


@pytest.mark.parametrize("size", [4096, CLUSTER_SIZE, MIB])
def test_direct_reads(disk: Disk, size: int) -> None:
    for pos in (0, 3 * CLUSTER_SIZE - 4096, 5 * MIB + 8192):
        assert read_direct(disk.path, pos, size) == disk.expected[pos : pos + size]


def test_a_read_is_cut_at_the_end(disk: Disk) -> None:
    with opened(disk.path, os.O_RDONLY) as fd:
        assert os.pread(fd, 8192, SIZE - 100) == disk.expected[-100:]
        assert os.pread(fd, 8192, SIZE) == b""
        assert os.pread(fd, 8192, SIZE + MIB) == b""
    start = SIZE // 4096 * 4096
    assert read_direct(disk.path, start, 8192) == disk.expected[start:]


@pytest.mark.parametrize("length", [1, 512, 4096, CLUSTER_SIZE, 3 * CLUSTER_SIZE + 5])
def test_writes_of_all_sizes(disk: Disk, length: int) -> None:
    for pos in (MIB + 4096, MIB + CLUSTER_SIZE - 3):
        assert disk.write(pos, os.urandom(length)) == length
        start = MIB - MIB % 4096
        assert disk.path.read_bytes()[start : start + MIB] == disk.expected[start : start + MIB]


def test_direct_writes(disk: Disk) -> None:
    data = os.urandom(CLUSTER_SIZE)
    pos = 2 * MIB + 4096
    assert write_direct(disk.path, pos, data) == len(data)
    disk.expected[pos : pos + len(data)] = data
    assert disk.path.read_bytes()[2 * MIB : 3 * MIB] == disk.expected[2 * MIB : 3 * MIB]


def test_a_write_across_the_end_is_short_and_one_past_it_finds_no_space(disk: Disk) -> None:
    assert disk.write(SIZE - 10, b"x" * 100) == 10
    with opened(disk.path) as fd:
        for pos in (SIZE, SIZE + 1, SIZE + MIB):
            with pytest.raises(OSError, match="No space") as caught:
                os.pwrite(fd, b"x", pos)
            assert caught.value.errno == errno.ENOSPC
    assert disk.path.stat().st_size == SIZE
    assert disk.path.read_bytes()[-4096:] == disk.expected[-4096:]


def test_appending_finds_no_space(disk: Disk) -> None:
    with opened(disk.path, os.O_WRONLY | os.O_APPEND) as fd, pytest.raises(OSError, match="No space"):
        os.write(fd, b"x")
    assert disk.path.stat().st_size == SIZE


def test_memory_maps_read_and_write(disk: Disk) -> None:
    pos = 3 * MIB + 12345
    with opened(disk.path) as fd, mmap.mmap(fd, SIZE, mmap.MAP_SHARED) as mapped:
        assert mapped[3 * MIB : 4 * MIB] == disk.expected[3 * MIB : 4 * MIB]
        mapped[pos : pos + 70_000] = disk.expected[pos : pos + 70_000] = os.urandom(70_000)
        mapped.flush()
        assert os.pread(fd, 70_000, pos) == disk.expected[pos : pos + 70_000]
    assert read_direct(disk.path, 3 * MIB, MIB) == disk.expected[3 * MIB : 4 * MIB]


def test_writing_to_the_last_page_of_a_map_stays_inside(disk: Disk) -> None:
    with opened(disk.path) as fd, mmap.mmap(fd, SIZE, mmap.MAP_SHARED) as mapped:
        mapped[SIZE - 1] = disk.expected[SIZE - 1] = 77
        mapped.flush()
    assert disk.path.stat().st_size == SIZE
    with opened(disk.path, os.O_RDONLY) as fd:
        assert os.pread(fd, 100, SIZE - 1) == bytes([77])


def test_many_openers_see_one_image(disk: Disk) -> None:
    fds = [os.open(disk.path, os.O_RDWR) for _ in range(50)]
    try:
        for number, fd in enumerate(fds):
            assert os.pwrite(fd, bytes([number]), 4 * MIB + number) == 1
        disk.expected[4 * MIB : 4 * MIB + 50] = bytes(range(50))
        assert all(os.pread(fd, 50, 4 * MIB) == bytes(range(50)) for fd in fds)
        assert disk.mount.image()["opens"] == 50
    finally:
        for fd in fds:
            os.close(fd)
    wait_for(lambda: disk.mount.image()["opens"] == 0, "last close")


def test_fsync_and_fdatasync(disk: Disk) -> None:
    with opened(disk.path) as fd:
        os.pwrite(fd, b"durable", MIB)
        disk.expected[MIB : MIB + 7] = b"durable"
        os.fsync(fd)
        os.fdatasync(fd)
    with opened(disk.path, os.O_RDONLY) as fd:
        os.fsync(fd)
    with opened(disk.mount.mountpoint, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def test_the_size_is_fixed(disk: Disk) -> None:
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError) as caught:
            os.truncate(disk.path, size)
        assert caught.value.errno == errno.EPERM
    with pytest.raises(PermissionError):
        os.open(disk.path, os.O_RDWR | os.O_TRUNC)
    os.truncate(disk.path, SIZE)
    assert disk.path.read_bytes()[-MIB:] == disk.expected[-MIB:]


def _mkfifo(disk: Disk) -> None:
    os.mkfifo(disk.mount.path("fifo"))


FORBIDDEN: dict[str, Callable[[Disk], object]] = {
    "unlink": lambda disk: disk.path.unlink(),
    "rename": lambda disk: disk.path.rename(disk.mount.path("other.raw")),
    "create": lambda disk: disk.mount.path("new.raw").touch(),
    "mkdir": lambda disk: disk.mount.path("folder").mkdir(),
    "mknod": _mkfifo,
    "link": lambda disk: disk.mount.path("hard").hardlink_to(disk.path),
    "symlink": lambda disk: disk.mount.path("soft").symlink_to("disk.raw"),
    "chmod": lambda disk: disk.path.chmod(0o600),
    "chown": lambda disk: os.chown(disk.path, 1, 1),
}


@pytest.mark.parametrize("change", FORBIDDEN)
def test_names_and_modes_are_those_of_the_overlays(disk: Disk, change: str) -> None:
    require_root()  # others would be refused by the folder's mode already
    with pytest.raises(PermissionError) as caught:
        FORBIDDEN[change](disk)
    assert caught.value.errno == errno.EPERM
    assert os.listdir(disk.mount.mountpoint) == ["disk.raw"]


def test_what_is_so_already_can_be_set(disk: Disk) -> None:
    """As `cp -p`, `rsync -a` and configuration tools do it."""
    before = disk.path.stat()
    disk.path.chmod(stat.S_IMODE(before.st_mode))
    os.chown(disk.path, before.st_uid, before.st_gid)
    os.chown(disk.path, -1, before.st_gid)
    os.truncate(disk.path, before.st_size)
    after = disk.path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_what_is_not_there(disk: Disk) -> None:
    with pytest.raises(FileNotFoundError):
        disk.mount.path("other.raw").stat()
    with pytest.raises(NotADirectoryError):
        (disk.path / "x").stat()


def test_statfs_is_that_of_the_overlays_file_system(disk: Disk) -> None:
    here, there = os.statvfs(disk.path), os.statvfs(disk.overlay)
    assert here.f_blocks * here.f_frsize == there.f_blocks * there.f_frsize
    assert abs(here.f_bavail * here.f_frsize - there.f_bavail * there.f_frsize) < 10 << 30


def test_qemu_io_without_cache(tmp_path: Path) -> None:
    """QEMU asks O_DIRECT of a FUSE file in units of 4 KiB, so the image is a multiple of that here."""
    with origin(tmp_path, MIB) as source, mounted_over(tmp_path, source.url) as mount:
        argv = [require("qemu-io"), "-f", "raw", "-t", "none"]
        for command in ("write -P 9 256k 4k", "read -P 9 256k 4k", "flush", "aio_write -P 7 320k 64k", "aio_flush"):
            argv += ["-c", command]
        subprocess.run([*argv, mount.path("disk.raw")], check=True, capture_output=True, timeout=HANG_SECONDS)
        expected = bytearray(source.data())
        expected[256 << 10 : 260 << 10] = b"\x09" * 4096
        expected[320 << 10 : 384 << 10] = b"\x07" * CLUSTER_SIZE
        assert mount.path("disk.raw").read_bytes() == expected


def test_all_that_was_written_is_there(disk: Disk) -> None:
    """Last in the module: the sum of the writes of the others."""
    assert disk.path.read_bytes() == disk.expected


def test_a_loop_device_and_the_file_system_inside(tmp_path: Path) -> None:
    require_root()
    files = tmp_path / "files"
    files.mkdir()
    data = random_image(files / "data", 2 * MIB).read_bytes()
    www = tmp_path / "www"
    www.mkdir()
    ext4_image(www / "disk", 16 * MIB, files)
    inside = tmp_path / "inside"
    inside.mkdir()
    with nginx(www) as server:
        create(tmp_path / "disk.qed", f"{server.url}/disk")
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
            loop = _loop("--find", "--show", mount.path("disk.raw"))
            try:
                _run(require("mount"), loop, inside)
                try:
                    assert (inside / "data").read_bytes() == data
                    (inside / "new").write_bytes(data[::-1])
                finally:
                    _run(require("umount"), inside)
            finally:
                _loop("--detach", loop)
            mount.wait()
            assert mount.unmount() == 0
    with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
        _run(require("mount"), "-o", "loop,ro", mount.path("disk.raw"), inside)
        try:
            assert (inside / "new").read_bytes() == data[::-1]
        finally:
            _run(require("umount"), inside)


def test_an_overlay_without_backing_is_a_disk_of_zeros(tmp_path: Path) -> None:
    qemu_create(tmp_path / "disk.qed", size=MIB)
    qemu_io(tmp_path / "disk.qed", "write -P 3 64k 64k")
    with mounted(tmp_path / "disk.qed", tmp_path / "mnt") as mount:
        expected = bytes(CLUSTER_SIZE) + b"\3" * CLUSTER_SIZE + bytes(MIB - 2 * CLUSTER_SIZE)
        assert mount.path("disk.raw").read_bytes() == expected
        mount.wait()


def _loop(*args: str | Path) -> str:
    return _run(require("losetup"), *args)


def _run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=HANG_SECONDS).stdout.strip()
