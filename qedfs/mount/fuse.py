"""The FUSE adapter: maps the kernel's requests to images of the registry.

Owns the handles of open images, and what each kind of request may do: none creates, removes, renames or resizes
anything. Must not know clusters or sources.

pyfuse3 replies to a request only if its handler returns or raises FUSEError; after any other exception the caller hangs
and pyfuse3's main loop ends, for all images. So each handler turns every exception into an errno.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FUSEError,
    InodeT,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from qedfs.errors import QedfsError
from qedfs.image.image import Image
from qedfs.image.seek import seek
from qedfs.image.zero_range import make_zeros
from qedfs.mount import fuse_wait
from qedfs.mount.fuse_attributes import changes, folder_attributes, image_attributes
from qedfs.mount.fuse_errors import FailureReplies
from qedfs.mount.fuse_session import FileSystem
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.registry import Registry
from qedfs.mount.served import Served

# Modes of fallocate(2), from <linux/falloc.h>.
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def total(handler: F) -> F:
    """Let a handler raise nothing but FUSEError. (read and write do this themselves, to save a call.)"""

    @functools.wraps(handler)
    async def replying(self: Operations, *args: Any) -> object:  # noqa: ANN401 - as the handler
        try:
            return await handler(self, *args)
        except Exception as exc:
            inode = args[0] if args and isinstance(args[0], int) else 0
            raise self._reply(exc, inode) from exc

    return cast("F", replying)


class Operations(FileSystem):
    """The requests of the kernel for one flat folder of images, whose sizes no request changes."""

    supports_dot_lookup = False
    enable_writeback_cache = False  # writes that returned would stay in the kernel, and be lost with the mount

    def __init__(self, registry: Registry, folder: OverlayFolder) -> None:
        super().__init__()
        self._registry = registry
        self._folder = folder
        # By handle; and by inode, if it is open. Earlier servers gave the inode as handle.
        self._images: dict[int, Image] = {}
        self._by_handle: dict[int, Served] = {}
        for served in registry.images():
            self._restore(served)
        registry.restored = self._restore
        self._failures = FailureReplies()

    # The read and write path.

    async def read(self, fh: int, off: int, size: int) -> Any:  # noqa: ANN401 - any buffer will do
        """Bytes of an image; fewer at its end."""
        try:
            return await self._images[fh].read(off, size)
        except Exception as exc:
            raise self._reply(exc, fh) from exc

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write inside an image."""
        try:
            return await self._images[fh].write(off, buf)
        except Exception as exc:
            raise self._reply(exc, fh) from exc

    def write_now(self, handle: int, pos: int, data: memoryview) -> bool:
        """Write inside an image, if that need not wait. If this is False, or raises anything, use `write`."""
        image = self._images.get(handle)
        return image is not None and image.write_now(pos, data)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Flush the image: data and entries together, whatever `datasync` is."""
        fuse_wait.next_request.late = True
        try:
            await self._images[fh].flush()
        except Exception as exc:
            raise self._reply(exc, fh) from exc

    def fsync_now(self, inode: int, reply: Callable[[int], None]) -> bool:
        """Flush the image if one barrier is enough, and reply with 0 or an errno. If this is False, use `fsync`."""
        image = self._images.get(inode)
        if image is None:
            return False
        fuse_wait.next_request.late = True

        def done(error: Exception | None) -> None:
            fuse_wait.next_request.late = False
            reply(0 if error is None else self._reply(error, inode).errno)

        return image.flush_now(done)

    @total
    async def lseek(self, inode: int, pos: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE; the kernel does the others itself. Nothing is fetched."""
        found = await seek(self._image(inode), pos, hole=whence == os.SEEK_HOLE)
        if found is None:
            raise FUSEError(errno.ENXIO)
        return found

    @total
    async def fallocate(self, inode: int, mode: int, pos: int, size: int) -> None:
        """PUNCH_HOLE and ZERO_RANGE: both make whole clusters zero clusters. Other modes are not supported.

        Mode 0 would have to reserve space, which the format cannot do. With this errno, glibc's posix_fallocate writes
        to each block instead, and fallocate(1) says that it is not supported.
        """
        image = self._image(inode)
        if mode not in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE, _ZERO_RANGE | _KEEP_SIZE):
            raise FUSEError(errno.EOPNOTSUPP)
        if not mode & _KEEP_SIZE and pos + size > image.size:
            raise FUSEError(errno.EFBIG)  # no request lets an image grow
        await make_zeros(image, pos, size)

    async def flush(self, fh: int) -> None:
        """close() of one descriptor. Nothing is made durable."""
        served = self._opened(fh)
        if served is not None:
            served.note_close()

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing to do: the folder has no data of its own."""

    # Names and attributes.

    @total
    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """An image by its name."""
        served = self._registry.by_name(os.fsdecode(name))
        if served is None and await self._registry.scan_if_changed():
            served = self._registry.by_name(os.fsdecode(name))
        if parent_inode != pyfuse3.ROOT_INODE or served is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(served)

    @total
    async def getattr(self, inode: InodeT, ctx: RequestContext | None = None) -> EntryAttributes:
        """Owner and mode: those of the overlay file; st_blocks is what it takes on disk. Times are the image's own."""
        return (
            folder_attributes(self._folder.stat())
            if inode == pyfuse3.ROOT_INODE
            else self._attributes(self._served(inode))
        )

    @total
    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Set the mtime. Other attributes are those of the overlay and may only be set to what they are.

        The atime is ignored: it is that of the overlay file.
        """
        served = self._served(inode)
        if served.image is None or changes(self._attributes(served), attr, fields):
            raise FUSEError(errno.EPERM)
        if fields.update_mtime:
            if served.image.gate is not None:
                await served.image.gate.passed()
            await served.image.overlay.set_modified(attr.st_mtime_ns)
        return await self.getattr(inode)

    @total
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        """Open an image. The page cache stays valid, since an image changes only through the mount."""
        served = self._served(inode)
        if served.image is None:
            raise FUSEError(errno.EIO)
        if flags & (os.O_WRONLY | os.O_RDWR) and not served.image.writable:
            raise FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            # With this flag no setattr follows: after a success the kernel assumes an empty image.
            raise FUSEError(errno.EPERM)
        keep_cache = served.note_open()
        handle = self._registry.numbers.opened(served)
        self._by_handle[handle] = served
        self._images[handle] = self._images[inode] = served.image
        return FileInfo(fh=FileHandleT(handle), keep_cache=keep_cache)

    @total
    async def release(self, fh: int) -> None:
        """The last descriptor of one open() was closed. Nothing happens if that is known, see `inode_numbers.py`."""
        numbers = self._registry.numbers
        served = self._by_handle.pop(fh, None)
        if served is not None:
            served.note_release()
            self._images.pop(fh, None)
            numbers.released(fh, served)
        elif (served := self._registry.by_inode(fh)) is not None:
            served.note_release()
            # After the answer.
            trio.lowlevel.current_trio_token().run_sync_soon(numbers.note_opens, served)
        else:
            numbers.released(fh)
            return
        if not served.opens:
            self._images.pop(served.inode, None)
        await self._registry.close_if_unused(served)

    async def forget(self, inode_list: Any) -> None:  # noqa: ANN401 - pairs of inode and count
        """Nothing to do: an inode lives as long as its overlay is in the folder or open."""

    @total
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> int:
        """Scan the folder, so that a listing is up to date."""
        if inode != pyfuse3.ROOT_INODE:
            raise FUSEError(errno.ENOTDIR)
        await self._registry.scan_if_changed()
        return int(inode)

    @total
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The images, in the order of their inodes, which are never reused."""
        for served in sorted(self._registry.images(), key=lambda one: one.inode):
            if served.inode <= start_id:
                continue
            try:
                attributes = self._attributes(served)
            except (FUSEError, QedfsError):
                continue  # an error of one image must not hide the others
            if not pyfuse3.readdir_reply(token, os.fsencode(served.name), attributes, served.inode):
                return

    async def releasedir(self, fh: int) -> None:
        """Nothing to do: opendir keeps no state."""

    @total
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The file system that holds the overlays."""
        found = self._folder.statvfs()
        data = StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(found, name))
        return data

    # Not supported: the folder's entries follow the overlays.

    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:
        """Never called: the kernel checks permissions (default_permissions)."""
        return True

    async def create(self, *_: object) -> tuple[FileInfo, EntryAttributes]:
        """Images come from overlays."""
        raise FUSEError(errno.EPERM)

    async def mknod(self, *_: object) -> EntryAttributes:
        """Images come from overlays."""
        raise FUSEError(errno.EPERM)

    async def mkdir(self, *_: object) -> EntryAttributes:
        """The folder is flat."""
        raise FUSEError(errno.EPERM)

    async def symlink(self, *_: object) -> EntryAttributes:
        """Images come from overlays."""
        raise FUSEError(errno.EPERM)

    async def link(self, *_: object) -> EntryAttributes:
        """An image has one name."""
        raise FUSEError(errno.EPERM)

    async def unlink(self, *_: object) -> None:
        """Remove the overlay instead."""
        raise FUSEError(errno.EPERM)

    async def rmdir(self, *_: object) -> None:
        """There are no folders."""
        raise FUSEError(errno.EPERM)

    async def rename(self, *_: object) -> None:
        """Rename the overlay instead."""
        raise FUSEError(errno.EPERM)

    # Inside.

    def _served(self, inode: int) -> Served:
        served = self._registry.by_inode(inode)
        if served is None:
            raise FUSEError(errno.ESTALE)
        return served

    def _restore(self, served: Served) -> None:
        """An image that was opened in an earlier server of this mount."""
        if served.opens and served.image is not None:
            self._images[served.inode] = served.image
            for handle in served.handles:
                self._images[handle], self._by_handle[handle] = served.image, served

    def _opened(self, number: int) -> Served | None:
        """What has this handle, or inode."""
        return self._by_handle.get(number) or self._registry.by_inode(number)

    def _image(self, inode: int) -> Image:
        image = self._images.get(inode)
        if image is None:
            raise FUSEError(errno.ESTALE)
        return image

    def _attributes(self, served: Served) -> EntryAttributes:
        if served.image is None:
            raise FUSEError(errno.ENOENT)
        return image_attributes(served.image, served.inode)

    def _reply(self, exc: Exception, number: int) -> FUSEError:
        if isinstance(exc, KeyError) and number not in self._images:
            return FUSEError(
                errno.ESTALE
            )  # a handle of an earlier server, whose image is another one now, or is not there
        served = self._opened(number)
        return self._failures.reply(exc, served.name if served else f"inode {number}")


def forget_name(name: str) -> None:
    """Drop the name of a removed image from the kernel's cache."""
    pyfuse3.invalidate_entry_async(pyfuse3.ROOT_INODE, pyfuse3.FileNameT(os.fsencode(name)), ignore_enoent=True)
