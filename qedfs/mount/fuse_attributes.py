"""The attributes of an image and of the folder, for the kernel.

Owns what the kernel is told, for how long it may keep that, and which setattr changes something. Must not change
anything.
"""

from __future__ import annotations

import os
import stat

import pyfuse3
from pyfuse3 import EntryAttributes, InodeT, SetattrFields

from qedfs.image.image import Image

# An image changes only through the mount, so the kernel may cache its attributes. What comes from the overlay file
# (owner, mode, st_blocks) may be up to this old.
ATTRIBUTE_SECONDS = 2.0


def image_attributes(image: Image, inode: int) -> EntryAttributes:
    """Owner, st_blocks and mode are those of the overlay file; mtime and ctime are the image's own.

    The mode has no execute bits, and no write bits if the image is read-only.

    Raises QedfsError if the attributes of the overlay file cannot be read.
    """
    overlay, status = image.overlay, image.overlay.file_status()
    attributes = _like(status)
    attributes.st_ino = InodeT(inode)
    write = 0 if image.writable else 0o222
    attributes.st_mode = pyfuse3.ModeT(stat.S_IFREG | (stat.S_IMODE(status.st_mode) & 0o666 & ~write))
    attributes.st_size = image.size
    attributes.st_blocks = status.st_blocks
    attributes.st_mtime_ns, attributes.st_ctime_ns = overlay.times.modified_ns, overlay.times.changed_ns
    return attributes


def folder_attributes(status: os.stat_result) -> EntryAttributes:
    """The attributes of the folder of overlays, without the write bits."""
    attributes = _like(status)
    attributes.st_ino = pyfuse3.ROOT_INODE
    attributes.st_mode = pyfuse3.ModeT(stat.S_IFDIR | (stat.S_IMODE(status.st_mode) & 0o555))
    attributes.st_nlink = 2
    return attributes


def changes(now: EntryAttributes, wanted: EntryAttributes, fields: SetattrFields) -> bool:
    """Whether a setattr changes anything but times.

    `cp -p`, `rsync -a` and `tar -x` set mode and owner to the values that they already have, which counts as no change.
    """
    return (
        (fields.update_size and wanted.st_size != now.st_size)
        or (fields.update_mode and stat.S_IMODE(wanted.st_mode) != stat.S_IMODE(now.st_mode))
        or (fields.update_uid and wanted.st_uid != now.st_uid)
        or (fields.update_gid and wanted.st_gid != now.st_gid)
    )


def _like(status: os.stat_result) -> EntryAttributes:
    """New attributes with the owner and the times of a file."""
    attributes = EntryAttributes()
    attributes.st_uid, attributes.st_gid = status.st_uid, status.st_gid
    attributes.st_blksize = 4096
    attributes.st_atime_ns, attributes.st_mtime_ns = status.st_atime_ns, status.st_mtime_ns
    attributes.st_ctime_ns = status.st_ctime_ns
    attributes.attr_timeout = attributes.entry_timeout = ATTRIBUTE_SECONDS
    return attributes
