"""What the tests of the real mount share: a served origin, direct I/O, a writer whose writes can be told again.

Knows files and servers, nothing of qedfs but its command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from qedfs.cli.commands.create import create as create_command
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import first_difference, qemu_check, qemu_info, qemu_same, random_image
from tests.harness.mounts import Mount, mounted
from tests.harness.require import require, require_root
from tests.harness.servers import Nginx, nginx

MIB = 1 << 20
CLUSTER_SIZE = 64 << 10  # what `qedfs create` makes


class Origin(NamedTuple):
    """A raw image, the nginx that serves its folder, and its URL there."""

    raw: Path
    server: Nginx
    url: str

    def data(self) -> bytes:
        """The image's bytes."""
        return self.raw.read_bytes()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes, in memory."""
    require_root()
    folder.mkdir()
    subprocess.run(
        [require("mount"), "-t", "tmpfs", "-o", f"size={size}", "qedfs-test", folder], check=True, timeout=HANG_SECONDS
    )
    try:
        yield folder
    finally:
        subprocess.run([require("umount"), "--lazy", folder], check=True, timeout=HANG_SECONDS)


@contextlib.contextmanager
def origin(folder: Path, size: int = 16 * MIB, *, seed: int = 0, location: str = "") -> Iterator[Origin]:
    """Serves `size` random bytes over HTTP; `location` is put into nginx's location block."""
    www = folder / "www"
    www.mkdir()
    raw = random_image(www / "disk", size, seed=seed)
    with nginx(www, location=location) as server:
        yield Origin(raw, server, f"{server.url}/disk")


def create(overlay: Path, url: str, *options: str) -> Path:
    """`qedfs create`, in this process: a tenth of the time of the tests went into starting programs for it."""
    done = CliRunner().invoke(create_command, [str(overlay), "--backing", url, *options])
    assert done.exit_code == 0, (done.output, done.exception)
    return overlay


@contextlib.contextmanager
def mounted_over(folder: Path, url: str, *options: str | Path) -> Iterator[Mount]:
    """A new overlay `folder`/disk.qed over `url`, mounted at `folder`/mnt with these options of `mount`."""
    overlay = folder / "disk.qed"
    if not overlay.exists():
        create(overlay, url)
    with mounted(overlay, folder / "mnt", *options) as mount:
        yield mount


def assert_whole(overlay: Path, raw: Path) -> None:
    """The overlay is free, clean by QEMU's judgement, without backing, and equal to the raw file."""
    assert qemu_check(overlay) == (0, 0)
    assert "backing-filename" not in qemu_info(overlay)
    assert qemu_same(overlay, raw)


def assert_same(image: Path, raw: Path) -> None:
    """Two files hold the same bytes."""
    assert first_difference(image, raw) is None


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor for the length of the block."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_direct(path: Path, pos: int, size: int) -> bytes:
    """Reads past the page cache; `pos` and `size` are multiples of 4096."""
    # An anonymous map is page-aligned, which O_DIRECT asks for.
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, size) as buffer:
        count = os.preadv(fd, [buffer], pos)
        return buffer[:count]


def write_direct(path: Path, pos: int, data: bytes) -> int:
    """Writes past the page cache; position and length are multiples of 4096. Returns the count of bytes."""
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, len(data)) as buffer:
        buffer[:] = data
        return os.pwritev(fd, [buffer], pos)


KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # <linux/falloc.h>


def make_hole(fd: int, pos: int, size: int, mode: int = PUNCH_HOLE | KEEP_SIZE) -> None:
    """fallocate(2) with a mode, which Python's os does not have."""
    if ctypes.CDLL(None, use_errno=True).fallocate64(fd, mode, ctypes.c_int64(pos), ctypes.c_int64(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Writer:
    """Random writes of all sizes and alignments, the same for the same seed, applied to any number of files."""

    def __init__(self, size: int, *, seed: int) -> None:
        self._random = random.Random(seed)
        self._size = size

    def next(self) -> tuple[int, bytes]:
        """The next write: its position and bytes. A fifth of them are all zeros."""
        source = self._random
        length = source.choice((1, 511, 512, 4096, 4097, 65536, 70000, 200_000))
        pos = source.randrange(self._size - length)
        if source.random() < 0.5:
            pos -= pos % 4096
        return pos, bytes(length) if source.random() < 0.2 else source.randbytes(length)
