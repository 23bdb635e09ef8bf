"""The disk that holds the overlay is full: writers learn it, readers do not, and the stream goes on with new room."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_check, qemu_same
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require, require_root

from .support import CLUSTER_SIZE, MIB, assert_same, create, make_hole, opened, origin, small_disk

SIZE = 16 * MIB


@contextlib.contextmanager
def full_disk(folder: Path, *options: str) -> Iterator[tuple[Path, Mount, Path]]:
    """The raw origin, a mount of an overlay twice as large as its disk, and a file there that can make room."""
    with (
        origin(folder, SIZE) as source,
        small_disk(folder / "small", SIZE + 4 * MIB) as disk,
    ):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(12 * MIB))
        overlay = create(disk / "disk.qed", source.url)
        with mounted(overlay, folder / "mnt", *options) as mount:
            yield source.raw, mount, ballast


def test_a_full_disk_pauses_the_stream_and_readers_go_on(tmp_path: Path) -> None:
    with full_disk(tmp_path) as (raw, mount, ballast):
        wait_for(lambda: mount.image()["state"] == "paused", "the pause")
        image = mount.image()
        assert re.search("space|full", image["reason"], re.IGNORECASE)
        assert re.search("space|full", image["error"], re.IGNORECASE)
        assert_same(mount.path("disk.raw"), raw)
        with opened(mount.path("disk.raw")) as fd:
            with pytest.raises(OSError, match="No space") as caught:
                _write_all_over(fd)
            assert caught.value.errno == errno.ENOSPC
        ballast.unlink()
        mount.wait()
        assert mount.image()["error"] is None
        assert mount.unmount() == 0
        # The places of writes that failed beside others were used again.
        assert qemu_check(tmp_path / "small" / "disk.qed") == (0, 0)


def test_a_mount_that_finds_a_full_disk_serves_and_fills_the_overlay_when_there_is_room(tmp_path: Path) -> None:
    """QEMU leaves holes where the record of a session has its place."""
    with origin(tmp_path, SIZE) as source, small_disk(tmp_path / "small", SIZE + 4 * MIB) as disk:
        overlay = disk / "disk.qed"
        options = ["-q", "-f", "qed", "-u", "-b", source.url, "-F", "raw"]
        subprocess.run([require("qemu-img"), "create", *options, overlay, str(SIZE)], check=True, timeout=HANG_SECONDS)
        _fill_up(disk / "ballast")
        with mounted(overlay, tmp_path / "mnt") as mount:
            wait_for(lambda: mount.image()["state"] == "paused", "the pause")
            assert "the file system is full" in mount.image()["error"]
            assert_same(mount.path("disk.raw"), source.raw)
            with opened(mount.path("disk.raw")) as fd:
                assert _error_of_write(fd, b"g", 0) == errno.ENOSPC
                (disk / "ballast").unlink()
                assert _error_of_write(fd, source.data()[:1], 0) is None
            mount.wait()
            assert mount.image()["error"] is None
            assert_same(mount.path("disk.raw"), source.raw)
            assert mount.unmount() == 0
        assert qemu_check(overlay) == (0, 0)


@contextlib.contextmanager
def small_ext4(folder: Path, size: int) -> Iterator[Path]:
    """An ext4 file system of `size` bytes on a loop device."""
    require_root()
    folder.mkdir()
    device = folder.with_suffix(".ext4")
    with device.open("wb") as file:
        file.truncate(size)
    subprocess.run([require("mkfs.ext4"), "-q", "-F", "-m", "0", device], check=True, timeout=HANG_SECONDS)
    subprocess.run([require("mount"), "-o", "loop", device, folder], check=True, timeout=HANG_SECONDS)
    try:
        yield folder
    finally:
        subprocess.run([require("umount"), "--lazy", folder], check=True, timeout=HANG_SECONDS)


def test_a_discard_gives_space_back_on_a_full_disk(tmp_path: Path) -> None:
    """Of data, although the entries of what was missing need new tables. They find their space in what comes back."""
    with origin(tmp_path, SIZE) as source, small_ext4(tmp_path / "small", 24 * MIB) as disk:
        # A table for each 4 MiB of the image: those for its second half do not exist yet.
        overlay = create(disk / "disk.qed", source.url, "--cluster-size", "4K", "--table-size", "2")
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            path, data = mount.path("disk.raw"), source.data()
            with opened(path) as fd:
                os.pwrite(fd, data[: SIZE // 2], 0)
                os.fsync(fd)
                _fill_up(disk / "ballast")
                assert _error_of_write(fd, b"w" * 4096, SIZE - 4096) == errno.ENOSPC
                with pytest.raises(OSError, match="No space left"):
                    make_hole(fd, SIZE // 2, SIZE // 2)  # nothing but missing clusters
                os.pwrite(fd, b"in place", 5)
                os.fsync(fd)  # which costs nobody else anything
                make_hole(fd, MIB, SIZE - MIB)
                os.fsync(fd)
                wait_for(lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 5 * MIB, "space to come back")
                assert _error_of_write(fd, b"w" * 4096, SIZE - 4096) is None
                os.fsync(fd)
            expected = bytearray(data[:MIB]).ljust(SIZE - 4096, b"\0") + b"w" * 4096
            expected[5:13] = b"in place"
            assert path.read_bytes() == expected
            assert mount.unmount() == 0
        source.raw.write_bytes(expected)
        assert qemu_check(overlay).corruptions == 0
        assert qemu_same(overlay, source.raw)


def _fill_up(path: Path) -> None:
    """Take all the room that there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _write_all_over(fd: int) -> None:
    """Backwards: the stream has come forward."""
    for pos in range(SIZE - CLUSTER_SIZE, -1, -CLUSTER_SIZE):
        os.pwrite(fd, b"w" * CLUSTER_SIZE, pos)


def test_what_was_written_before_the_disk_was_full_is_there(tmp_path: Path) -> None:
    with full_disk(tmp_path, "--no-stream") as (raw, mount, ballast):
        expected = bytearray(raw.read_bytes())
        with opened(mount.path("disk.raw")) as fd:
            for pos in range(0, SIZE, CLUSTER_SIZE):
                piece = os.urandom(CLUSTER_SIZE)
                if (error := _error_of_write(fd, piece, pos)) is not None:
                    break
                expected[pos : pos + CLUSTER_SIZE] = piece
        assert error == errno.ENOSPC
        raw.with_name("expected").write_bytes(expected)
        with contextlib.suppress(OSError), opened(mount.path("disk.raw")) as fd:
            os.fsync(fd)
        assert mount.path("disk.raw").read_bytes() == expected
        ballast.unlink()
        with opened(mount.path("disk.raw")) as fd:
            assert os.pwrite(fd, b"again", SIZE - 5) == 5
            os.fsync(fd)
        expected[-5:] = b"again"
        assert mount.unmount() == 0
        overlay = tmp_path / "small" / "disk.qed"
        raw.with_name("expected").write_bytes(expected)
        assert qemu_check(overlay).corruptions == 0
        assert qemu_same(overlay, raw.with_name("expected"))


def _error_of_write(fd: int, data: bytes, pos: int) -> int | None:
    """Writes all of it; or the errno."""
    try:
        count = os.pwrite(fd, data, pos)
    except OSError as exc:
        return exc.errno
    assert count == len(data)
    return None


def test_an_unmount_whose_last_flush_fails_says_so(tmp_path: Path) -> None:
    with (
        origin(tmp_path, SIZE) as source,
        small_disk(tmp_path / "small", SIZE) as disk,
        mounted(create(disk / "disk.qed", source.url), tmp_path / "mnt", "--no-stream") as mount,
    ):
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"w" * CLUSTER_SIZE, 0)
            with contextlib.suppress(OSError):
                (disk / "ballast").write_bytes(bytes(2 * SIZE))
        done = qedfs("umount", mount.mountpoint, check=False)
        assert done.returncode == 6
        assert re.fullmatch(r"qedfs: .*disk.*(space|full).*\n", done.stderr)
        assert mount.wait_exit() == 6
        again = qedfs("umount", mount.mountpoint, check=False)
        assert again.returncode == 10
        assert "nothing is mounted" in again.stderr


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    """FAT takes 4 GiB, `ulimit -f` and LimitFSIZE= what they say: EFBIG, and a signal."""
    limited = [require("prlimit"), f"--fsize={6 * MIB}:"]  # the soft limit
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt", through=limited) as mount:
            wait_for(lambda: mount.image()["state"] == "paused", "the pause")
            assert "allows no larger file" in mount.image()["reason"]
            assert_same(mount.path("disk.raw"), source.raw)
            data = source.data()
            with opened(mount.path("disk.raw")) as fd:
                with pytest.raises(OSError, match="No space left") as failed:
                    _write_synced(fd, data)
                assert failed.value.errno == errno.ENOSPC
            subprocess.run([require("prlimit"), f"--pid={mount.pid}", "--fsize=unlimited:"], check=True)
            mount.wait()
            assert mount.unmount() == 0
        assert qemu_check(overlay) == (0, 0)
        assert qemu_same(overlay, source.raw)


def _write_synced(fd: int, data: bytes) -> None:
    for pos in range(0, len(data), CLUSTER_SIZE):
        assert os.pwrite(fd, data[pos : pos + CLUSTER_SIZE], pos) == CLUSTER_SIZE
        os.fsync(fd)


def test_create_names_what_keeps_a_file_from_growing(tmp_path: Path) -> None:
    limited = [require("prlimit"), "--fsize=4096", sys.executable, "-m", "qedfs"]
    done = subprocess.run(
        [*limited, "create", tmp_path / "disk.qed", "--size", "1G"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (6, [])
    assert "no space left to create it" in done.stderr
