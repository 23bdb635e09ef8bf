"""The requests of the kernel, given to the handlers without a kernel: what each answers, and with which errno it fails.

`test_fuse.py` asks the same through a real mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest

from qedfs.mount.fuse import Operations
from qedfs.mount.held import HolderLink
from qedfs.mount.inode_numbers import InodeNumbers
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.registry import Registry
from qedfs.mount.served import Served
from tests.fakes.source import FakeSource
from tests.fakes.storage import MemoryStorage
from tests.overlay.images import empty
from tests.served import CLUSTER, served

INODE = 5
BROKEN = 6  # an overlay that cannot be served
CONTENT = bytes(range(256)) * (4 * CLUSTER // 256)
CONTEXT = cast("pyfuse3.RequestContext", None)
PUNCH_HOLE, KEEP_SIZE, ZERO_RANGE = 2, 1, 16
FIELDS = ("update_size", "update_mode", "update_uid", "update_gid", "update_mtime", "update_atime", "update_ctime")

pytestmark = pytest.mark.usefixtures("autojump_clock")


class Placed(MemoryStorage):
    """A file with the attributes of a real one."""

    place = Path()

    def stat(self) -> os.stat_result:
        return self.place.stat()


class Overlays:
    """A registry of two overlays, and their folder."""

    def __init__(self, *found: Served) -> None:
        self._found = found
        self.numbers = InodeNumbers(HolderLink())
        self.restored: Callable[[Served], None] = lambda _: None
        self.asked_to_close: list[str] = []

    def by_name(self, name: str) -> Served | None:
        return next((one for one in self._found if one.name == name), None)

    def by_inode(self, inode: int) -> Served | None:
        return next((one for one in self._found if one.inode == inode), None)

    def images(self) -> tuple[Served, ...]:
        return self._found

    async def scan_if_changed(self) -> bool:
        return True

    async def close_if_unused(self, one: Served) -> None:
        self.asked_to_close.append(one.name)


@contextlib.asynccontextmanager
async def operations(tmp_path: Path, *, writable: bool = True) -> AsyncIterator[Operations]:
    """Handlers over one image of four clusters, and an overlay without an image."""
    data = empty(cluster_size=CLUSTER, image_size=len(CONTENT), backing=b"http://fake/disk.raw").data
    storage = Placed(data, writable=writable)
    storage.place = tmp_path
    async with served(FakeSource(CONTENT), storage=storage) as image:
        good = Served("disk.raw", "/disk.qed", INODE, (0, 0, 0), image)
        registry = Overlays(good, Served("broken.raw", "/broken.qed", BROKEN, (0, 0, 0)))
        folder = SimpleNamespace(stat=lambda: os.stat(tmp_path), statvfs=lambda: os.statvfs(tmp_path))
        yield Operations(cast("Registry", registry), cast("OverlayFolder", folder))


async def refused(request: Awaitable[object]) -> int:
    """The errno of a request that must fail."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await request
    return caught.value.errno


async def test_an_image_is_found_opened_read_written_flushed_and_released(tmp_path: Path) -> None:
    async with operations(tmp_path) as ops:
        found = await ops.lookup(pyfuse3.ROOT_INODE, b"disk.raw", CONTEXT)
        assert (found.st_ino, found.st_size) == (INODE, len(CONTENT))
        opened = await ops.open(pyfuse3.InodeT(INODE), os.O_RDWR, CONTEXT)
        handle = opened.fh
        assert (handle > INODE, opened.keep_cache) == (True, True)
        assert bytes(await ops.read(handle, 0, 4096)) == CONTENT[:4096]
        assert await ops.write(handle, 100, b"mine") == 4
        assert bytes(await ops.read(handle, 98, 8)) == CONTENT[98:100] + b"mine" + CONTENT[104:106]
        assert bytes(await ops.read(handle, len(CONTENT) - 10, 100)) == CONTENT[-10:]
        await ops.fsync(handle, datasync=True)
        await ops.flush(handle)
        await ops.release(handle)
        assert await refused(ops.read(handle, 0, 1)) == errno.ESTALE  # of a handle that nobody has
        assert await refused(ops.write(handle, 0, b"late")) == errno.ESTALE
        assert await refused(ops.fsync(handle, datasync=True)) == errno.ESTALE
        assert cast("Overlays", ops._registry).asked_to_close == ["disk.raw"]


async def test_only_a_write_in_place_and_inside_the_image_is_done_without_an_await(tmp_path: Path) -> None:
    async with operations(tmp_path) as ops:
        handle = (await ops.open(pyfuse3.InodeT(INODE), os.O_RDWR, CONTEXT)).fh
        counters = ops._image(INODE).counters
        assert not ops.write_now(handle, 0, memoryview(b"x" * 10))  # the rest of the cluster is missing
        await ops.write(handle, 0, b"x" * 10)
        last = len(CONTENT) - CLUSTER
        await ops.write(handle, last, b"y" * CLUSTER)
        before = counters.written
        assert ops.write_now(handle, 5, memoryview(b"z" * 10))
        assert not ops.write_now(handle, len(CONTENT) - 4, memoryview(b"z" * 5))
        assert ops.write_now(handle, len(CONTENT) - 4, memoryview(b"z" * 4))
        assert counters.written == before + 14
        assert bytes(await ops.read(handle, 0, 16)) == b"x" * 5 + b"z" * 10 + CONTENT[15:16]
        assert bytes(await ops.read(handle, last, CLUSTER)) == b"y" * (CLUSTER - 4) + b"z" * 4
        await ops.release(handle)
        assert not ops.write_now(handle, 5, memoryview(b"late"))


async def test_a_release_that_the_kernel_repeats_counts_once(tmp_path: Path) -> None:
    async with operations(tmp_path) as ops:
        (served,) = (one for one in ops._registry.images() if one.inode == INODE)
        handles = [(await ops.open(pyfuse3.InodeT(INODE), os.O_RDWR, CONTEXT)).fh for _ in range(3)]
        await ops.release(handles[0])
        await ops.release(handles[0])
        assert (served.opens, served.handles) == (2, set(handles[1:]))
        assert bytes(await ops.read(handles[2], 0, 10)) == CONTENT[:10]
        await ops.release(handles[1])
        await ops.release(handles[2])
        await ops.release(handles[1])
        assert served.opens == 0


async def test_attributes_are_told_and_only_the_mtime_can_be_set(tmp_path: Path) -> None:
    async with operations(tmp_path) as ops:
        inode = pyfuse3.InodeT(INODE)
        assert (await ops.getattr(pyfuse3.ROOT_INODE)).st_nlink == 2
        wanted = await ops.getattr(inode)
        fields: Any = SimpleNamespace(**dict.fromkeys(FIELDS, False))
        fields.update_mtime = True
        wanted.st_mtime_ns = 12_345
        assert (await ops.setattr(inode, wanted, fields, None, CONTEXT)).st_mtime_ns == 12_345
        fields.update_size = True
        wanted.st_size = 1
        assert await refused(ops.setattr(inode, wanted, fields, None, CONTEXT)) == errno.EPERM
        assert (await ops.statfs(CONTEXT)).f_bsize == os.statvfs(tmp_path).f_bsize


@pytest.mark.parametrize(
    ("inode", "flags", "code"),
    [(INODE, os.O_RDWR | os.O_TRUNC, errno.EPERM), (BROKEN, os.O_RDONLY, errno.EIO), (99, os.O_RDONLY, errno.ESTALE)],
)
async def test_what_cannot_be_opened(tmp_path: Path, inode: int, flags: int, code: int) -> None:
    async with operations(tmp_path) as ops:
        assert await refused(ops.open(pyfuse3.InodeT(inode), flags, CONTEXT)) == code


async def test_a_read_only_image_is_not_opened_for_writing(tmp_path: Path) -> None:
    async with operations(tmp_path, writable=False) as ops:
        assert await refused(ops.open(pyfuse3.InodeT(INODE), os.O_RDWR, CONTEXT)) == errno.EROFS


async def test_names_that_are_not_there(tmp_path: Path) -> None:
    async with operations(tmp_path) as ops:
        assert await refused(ops.lookup(pyfuse3.ROOT_INODE, b"other.raw", CONTEXT)) == errno.ENOENT
        assert await refused(ops.lookup(pyfuse3.ROOT_INODE, b"broken.raw", CONTEXT)) == errno.ENOENT
        assert await refused(ops.lookup(pyfuse3.InodeT(INODE), b"disk.raw", CONTEXT)) == errno.ENOENT
        assert await refused(ops.getattr(pyfuse3.InodeT(99))) == errno.ESTALE
        assert await refused(ops.opendir(pyfuse3.InodeT(INODE), CONTEXT)) == errno.ENOTDIR
        assert await ops.opendir(pyfuse3.ROOT_INODE, CONTEXT) == pyfuse3.ROOT_INODE


async def test_holes_are_made_and_found(tmp_path: Path) -> None:
    async with operations(tmp_path) as ops:
        await ops.open(pyfuse3.InodeT(INODE), os.O_RDWR, CONTEXT)
        await ops.fallocate(INODE, PUNCH_HOLE | KEEP_SIZE, CLUSTER, CLUSTER)
        await ops.fallocate(INODE, ZERO_RANGE, 2 * CLUSTER, CLUSTER)
        assert bytes(await ops.read(INODE, CLUSTER, 2 * CLUSTER)) == bytes(2 * CLUSTER)
        assert await ops.lseek(INODE, 0, os.SEEK_HOLE) == CLUSTER
        assert await ops.lseek(INODE, CLUSTER, os.SEEK_DATA) == 3 * CLUSTER
        assert await refused(ops.lseek(INODE, len(CONTENT), os.SEEK_DATA)) == errno.ENXIO


@pytest.mark.parametrize(
    ("mode", "size", "code"),
    [
        (0, CLUSTER, errno.EOPNOTSUPP),
        (PUNCH_HOLE, CLUSTER, errno.EOPNOTSUPP),
        (KEEP_SIZE, CLUSTER, errno.EOPNOTSUPP),
        (ZERO_RANGE, len(CONTENT) + 1, errno.EFBIG),
    ],
)
async def test_what_cannot_be_allocated(tmp_path: Path, mode: int, size: int, code: int) -> None:
    async with operations(tmp_path) as ops:
        await ops.open(pyfuse3.InodeT(INODE), os.O_RDWR, CONTEXT)
        assert await refused(ops.fallocate(INODE, mode, 0, size)) == code
        assert await refused(ops.fallocate(BROKEN, PUNCH_HOLE | KEEP_SIZE, 0, 1)) == errno.ESTALE


@pytest.mark.parametrize("name", ["create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename"])
async def test_the_folder_is_that_of_the_overlays(tmp_path: Path, name: str) -> None:
    async with operations(tmp_path) as ops:
        handler: Callable[..., Awaitable[Any]] = getattr(ops, name)
        assert await refused(handler(pyfuse3.ROOT_INODE, b"new")) == errno.EPERM
