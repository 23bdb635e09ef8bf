"""A disk whose writes fail on request, with a file system on it: simulates a medium that fails and then recovers.

Owns the FUSE server that holds the disk's bytes (run as a program of its own), the loop device over it and the mount.
Must not know what is stored there.

A write that contains a given pattern is answered with EIO, so many times, and is not stored. All else is stored at
once: what the server has is what a power cut would leave, once the kernel has been told to forget its page cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import trio

from tests.harness.hang import HANG_SECONDS
from tests.harness.process import Child
from tests.harness.require import require, require_fuse, require_root

_NAME = "disk"
_INODE = pyfuse3.InodeT(2)
_MKFS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}


class FailingDisk:
    """A mounted file system on a disk whose writes can be made to fail."""

    def __init__(self, folder: Path, orders: Path, device: str) -> None:
        self.folder = folder
        self._orders = orders
        self._device = device

    def fail_writes(self, pattern: bytes, *, times: int = 1) -> None:
        """Answer the next writes that contain `pattern` with EIO."""
        fresh = self._orders.with_suffix(".new")
        fresh.write_text(f"{times} {pattern.hex()}")
        fresh.replace(self._orders)

    @property
    def failures_left(self) -> int:
        """How many of the writes that were to fail have not come yet."""
        try:
            return int(self._orders.read_text().split()[0])
        except (FileNotFoundError, IndexError):
            return 0

    def forget_cache(self) -> None:
        """What a power cut does to the page cache, where everything that can be written has been."""
        # It reports the errors that were asked for.
        subprocess.run(["sync", "--file-system", self.folder], check=False, capture_output=True, timeout=HANG_SECONDS)
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def failing_disk(folder: Path, kind: str, size: int) -> Iterator[FailingDisk]:
    """A fresh file system of `kind` (ext4, xfs, btrfs) and `size` bytes at `folder`, for the length of the block."""
    require_root()
    require_fuse()
    below = folder.with_name(folder.name + "-disk")
    orders = folder.with_name(folder.name + "-orders")
    folder.mkdir()
    below.mkdir()
    with contextlib.ExitStack() as stack:
        server = Child(
            [sys.executable, "-m", __name__, str(below), str(size), str(orders)],
            folder.with_name(folder.name + "-log"),
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        stack.callback(server.stop)
        stack.callback(_run, "umount", "--lazy", below)
        server.wait_until((below / _NAME).exists, "the failing disk")
        program, *options = _MKFS[kind]
        _run(program, *options, below / _NAME)
        device = _run("losetup", "--find", "--show", below / _NAME).strip()
        stack.callback(_run, "losetup", "--detach", device)
        _run("mount", "-t", kind, device, folder)
        stack.callback(_unmounted, folder)
        yield FailingDisk(folder, orders, device)


def _unmounted(folder: Path) -> None:
    # A process of a failed test may still have a file open there.
    _run("umount", "--lazy", folder)


def _run(program: str, *args: str | Path) -> str:
    done = subprocess.run([require(program), *args], capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{program}: exit code {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


class _Server(pyfuse3.Operations):
    """One file of fixed size in memory."""

    def __init__(self, size: int, orders: Path) -> None:
        super().__init__()
        self._store = os.memfd_create(_NAME)
        os.ftruncate(self._store, size)
        self._size = size
        self._orders = orders

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600 if inode == _INODE else stat.S_IFDIR | 0o700)
        entry.st_size = self._size if inode == _INODE else 0
        entry.st_blksize = 4096
        entry.attr_timeout = entry.entry_timeout = 3600
        return entry

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(self, inode: pyfuse3.InodeT, *_: object) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if os.fsdecode(name) != _NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(_INODE)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(_INODE), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return os.pread(self._store, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        if self._fails(buf):
            raise pyfuse3.FUSEError(errno.EIO)
        return os.pwrite(self._store, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Nothing is held back."""

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """As `fsync`."""

    def _fails(self, data: bytes) -> bool:
        try:
            times, pattern = self._orders.read_text().split()
        except FileNotFoundError:
            return False
        if not int(times) or bytes.fromhex(pattern) not in data:
            return False
        self._orders.write_text(f"{int(times) - 1} {pattern}")
        return True


def _main(mountpoint: str, size: str, orders: str) -> None:
    pyfuse3.init(_Server(int(size), Path(orders)), mountpoint, {"fsname=failing-disk", "allow_other"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _main(*sys.argv[1:])
