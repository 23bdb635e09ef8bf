"""An image has times of its own: copies and backups see a guest's writes in them, and nothing else."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for
from tests.harness.require import require

from .support import MIB, create, opened, origin

SIZE = 16 * MIB
SLOW = "limit_rate 3m;"
# <linux/stat.h>, <linux/fcntl.h>
STATX_BASIC_STATS = 0x7FF
AT_STATX_FORCE_SYNC, AT_EMPTY_PATH = 0x2000, 0x1000
CTIME_AT, MTIME_AT = 96, 112  # in struct statx: seconds, nanoseconds


def times(image: Path) -> tuple[int, int]:
    """mtime and ctime as the mount tells them, not as the kernel remembers them, which then knows them too."""
    with opened(image, os.O_RDONLY) as fd:
        return _ask_for_times(fd)


def _ask_for_times(fd: int) -> tuple[int, int]:
    found = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(fd, b"", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, found):
        raise OSError(ctypes.get_errno(), "statx")
    mtime, ctime = (struct.unpack_from("=qI", found, at) for at in (MTIME_AT, CTIME_AT))
    return mtime[0] * 10**9 + mtime[1], ctime[0] * 10**9 + ctime[1]


def read_all(image: Path, size: int = SIZE) -> None:
    """Through the page cache."""
    with opened(image, os.O_RDONLY) as fd:
        for pos in range(0, size, MIB):
            assert len(os.pread(fd, MIB, pos)) == MIB


def write(image: Path, data: bytes, pos: int = 0) -> None:
    with opened(image) as fd:
        assert os.pwrite(fd, data, pos) == len(data)


def wait_for_stream(mount: Mount) -> None:
    """Until it has brought in something more."""
    before = mount.image()["counters"]["kept_stream"]
    wait_for(lambda: mount.image()["counters"]["kept_stream"] > before, "a streamed cluster")


def test_no_backup_takes_reading_for_a_change(tmp_path: Path) -> None:
    """tar's read brings the image in, and a stream and the end of the mount write to the overlay too."""
    with origin(tmp_path, SIZE, location=SLOW) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        before = overlay.stat()
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            image = mount.path("disk.raw")
            done = subprocess.run(
                [require("tar"), "-cf", tmp_path / "backup.tar", "-C", mount.mountpoint, image.name],
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, "")
            assert times(image) == (before.st_mtime_ns, before.st_mtime_ns)
            # tar may have its answer before the last cluster is kept.
            wait_for(lambda: mount.image()["counters"]["kept_asked"] == SIZE, "all clusters to be kept")
            assert mount.unmount() == 0
        assert overlay.stat().st_mtime_ns > before.st_mtime_ns
        with mounted(overlay, tmp_path / "mnt") as mount:
            mount.wait()
            assert times(mount.path("disk.raw")) == (before.st_mtime_ns, before.st_mtime_ns)
            mount.kill()
        with mounted(overlay, tmp_path / "mnt", "--read-only") as mount:
            assert times(mount.path("disk.raw")) == (before.st_mtime_ns, before.st_mtime_ns)


def test_the_page_cache_of_an_image_stays_beside_a_stream(tmp_path: Path) -> None:
    """The kernel drops it when the mtime moves: all that is read again would come through FUSE again."""
    with (
        origin(tmp_path, SIZE) as source,
        mounted(create(tmp_path / "disk.qed", source.url), tmp_path / "mnt", "--limit", "100K") as mount,
    ):
        image = mount.path("disk.raw")
        read_all(image, 4 * MIB)
        counted = mount.image()["counters"]
        for _ in range(2):
            wait_for_stream(mount)
            times(image)  # a reader's kernel asks again after 2 s, and only then could it notice
            read_all(image, 4 * MIB)
        after = mount.image()
        assert after["state"] == "running"
        # The kernel's own read-ahead may still bring in some pages behind the last read; a drop brings in 8 MiB again.
        assert after["counters"]["read"] - counted["read"] < MIB


def test_a_write_moves_them_for_good(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt") as mount:
            image = mount.path("disk.raw")
            mount.wait()
            before = times(image)
            write(image, b"1")
            first = times(image)
            assert first > before
            write(image, b"2")  # in place, at once
            last = times(image)
            assert last > first
            assert mount.unmount() == 0
        with mounted(overlay, tmp_path / "mnt") as mount:
            assert times(mount.path("disk.raw")) == last
            write(mount.path("disk.raw"), b"3")
            killed = times(mount.path("disk.raw"))
            mount.kill()
        with mounted(overlay, tmp_path / "mnt") as mount:
            assert times(mount.path("disk.raw")) >= killed


def test_a_user_sets_them(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)

        def seen(mount: Mount) -> int:
            return times(mount.path("disk.raw"))[0]

        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            old = seen(mount)
            subprocess.run([require("touch"), mount.path("disk.raw")], check=True)
            assert seen(mount) > old
            os.utime(mount.path("disk.raw"), ns=(7, 12345))
            assert mount.path("disk.raw").stat().st_mtime_ns == 12345
            assert mount.unmount() == 0
        with mounted(overlay, tmp_path / "mnt", "--read-only") as mount:
            assert seen(mount) == 12345
            with pytest.raises(OSError, match="Read-only file system"):
                os.utime(mount.path("disk.raw"))
