"""Make a new, empty overlay. Owns the layout of a fresh file; must not know how a backing is reached."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile

from qedfs.errors import BadOverlay, NoSpace, UsageError
from qedfs.format.geometry import Geometry, round_up
from qedfs.format.header import BACKING_FILE, HEADER_BYTES, MAX_BACKING_NAME, NO_PROBE, Header
from qedfs.format.record import SLOT_BYTES, Record, encode_record, slot_index, slot_offsets
from qedfs.host.durable import sync_folder


def create_overlay(
    path: str,
    *,
    image_size: int,
    backing: str | None,
    raw_backing: bool = True,
    cluster_size: int = 1 << 16,
    table_size: int = 4,
    copy_on_read: bool = True,
) -> Header:
    """Write an empty overlay at `path`, which must not exist. Sizes in bytes, `table_size` in clusters.

    The image size is rounded up to a multiple of 512, as QEMU does. The file appears whole or not at all: a folder that
    is mounted never shows half of one. It survives a power cut from the return on. The default geometry is QEMU's;
    table sizes 8 and 16 make QEMU corrupt images, and 1 it cannot open.

    Raises:
        UsageError: the file exists, the folder takes no file, or the numbers or the backing's name cannot be.
        NoSpace: the file system is full, or takes no file of that size.
    """
    name = encode_backing_name(backing or "")
    header = _header(Geometry(cluster_size, table_size, round_up(image_size, 512)), name, raw_backing=raw_backing)
    record = encode_record(Record(copy_on_read=copy_on_read))
    try:
        _write_new(path, header, name, record)
    except FileExistsError as exc:
        raise UsageError(f"{path}: exists already; remove it or choose another name") from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpace(f"{path}: no space left to create it") from exc
        raise UsageError(f"{path}: cannot be created: {exc.strerror}") from exc
    return header


def encode_backing_name(text: str) -> bytes:
    """The backing name as it is stored.

    Raises:
        UsageError: it is too long, or not UTF-8 (from the command line such bytes come as surrogates). QED would hold
            any bytes, but what shows, logs or sends the name needs text, so an overlay that has others is not served.
    """
    try:
        name = text.encode()
    except UnicodeEncodeError as exc:
        hint = "in a URL write its bytes like %FF, to a file make a link with another name"
        raise UsageError(f"the backing name is not UTF-8; {hint}") from exc
    if len(name) > MAX_BACKING_NAME:
        raise UsageError(f"the backing name is longer than {MAX_BACKING_NAME} bytes")
    return name


def _header(geometry: Geometry, name: bytes, *, raw_backing: bool) -> Header:
    fault = geometry.fault()
    if fault:
        raise UsageError(fault)
    features = 0
    if name:
        features = BACKING_FILE | (NO_PROBE if raw_backing else 0)
    header_size = -(-(HEADER_BYTES + MAX_BACKING_NAME + 2 * SLOT_BYTES) // geometry.cluster_size)
    area = header_size * geometry.cluster_size
    return Header(geometry, header_size, features, 0, 0, area, HEADER_BYTES, len(name))


def _write_new(path: str, header: Header, name: bytes, record: bytes) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    fd, temporary = tempfile.mkstemp(prefix=".qedfs-", dir=folder)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(header.encode() + name)
            slots = slot_offsets(header)
            if slots is None:
                raise BadOverlay("no room for the record in a header of our own making")
            file.seek(slots[slot_index(Record())])
            file.write(record)
            file.truncate(header.l1_table_offset + header.geometry.table_bytes)
            file.flush()
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(fd, 0o666 & ~umask)
            # Before the name is there: a power cut must leave no overlay without its bytes. Not fdatasync, which leaves
            # the mode to chance.
            os.fsync(fd)
        # link, not rename: it fails where the name is taken.
        os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    try:
        # Behind the link: otherwise a power cut could take away an overlay that we said was made.
        sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
