"""Creates new, empty overlays. Owns the layout of a new file. Must not know how a backing is reached."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import tempfile

from qedfs.errors import BadOverlay, NoSpace, UsageError, file_error
from qedfs.format.geometry import Geometry, round_up
from qedfs.format.header import BACKING_FILE, HEADER_BYTES, MAX_BACKING_NAME, NO_PROBE, Header
from qedfs.format.record import SLOT_BYTES, Pin, Record, Standby, digest, encode_record, slot_index, slot_offsets
from qedfs.host.durable import sync_folder
from qedfs.overlay.preallocation import Preallocation, reserve, write_tables


def create_overlay(  # noqa: PLR0913 - what may be said about a new overlay
    path: str,
    *,
    image_size: int,
    backing: str | None,
    raw_backing: bool = True,
    cluster_size: int = 1 << 16,
    table_size: int = 4,
    copy_on_read: bool = True,
    private: bool = False,
    standby: bool = False,
    source_size: int | None = None,
    preallocation: Preallocation = Preallocation.OFF,
    on_source_error: str = "",
) -> Header:
    """Create an empty overlay at `path`, which must not exist. Sizes are in bytes, `table_size` in clusters.

    The image size is rounded up to a multiple of 512, as in QEMU. The file appears atomically, so a mounted folder
    never shows an incomplete one. Once this function has returned, the file survives a power cut. The default geometry
    is QEMU's. With table sizes 8 and 16 QEMU corrupts images, and with 1 it cannot open them. `private`: only the
    owner may read and write the file, whatever the umask allows. `standby`: mounts keep nothing of the backing until
    the overlay is activated. The backing must have `source_size` bytes then, unless that is None. `on_source_error`:
    as the record holds it. `preallocation`: which tables and
    which space the file gets at once.

    Raises:
        UsageError: the file exists, its folder does not, or the geometry or the backing's name is invalid.
        Inaccessible: the folder is not writable.
        NoSpace: the file system is full, or does not allow a file of that size.
    """
    name = encode_backing_name(backing or "")
    header = _header(Geometry(cluster_size, table_size, round_up(image_size, 512)), name, raw_backing=raw_backing)
    record = Record(copy_on_read=copy_on_read, on_source_error=on_source_error)
    if standby:
        pin = None if source_size is None else Pin(digest(backing or ""), source_size)
        record = dataclasses.replace(record, standby=Standby.WAITING, pin=pin)
    try:
        _write_new(path, header, name, encode_record(record), 0o600 if private else 0o666, preallocation)
    except FileExistsError as exc:
        raise already_exists(path) from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpace(f"{path}: no space left to create it") from exc
        if exc.errno == errno.EOPNOTSUPP:
            raise UsageError(f"{path}: its file system cannot reserve space; use --preallocation metadata") from exc
        raise file_error(f"{path}: cannot be created: {exc.strerror}", exc) from exc
    return header


def already_exists(path: str) -> UsageError:
    """The error for a file that is there already. Nothing is ever replaced by a new overlay."""
    return UsageError(f"{path}: exists already; remove it or choose another name")


def encode_backing_name(text: str) -> bytes:
    """The backing name as it is stored.

    Raises:
        UsageError: it is too long, or not UTF-8. (In arguments of the command line, other bytes become surrogates.) QED
            allows any bytes. But a name has to be text to be shown, logged or sent, so qedfs serves no overlay whose
            backing name is not UTF-8.
    """
    try:
        name = text.encode()
    except UnicodeEncodeError as exc:
        hint = "in a URL write its bytes like %FF, for a file create a link with another name"
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


def _write_new(path: str, header: Header, name: bytes, record: bytes, mode: int, preallocation: Preallocation) -> None:
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
            end = header.l1_table_offset + header.geometry.table_bytes
            if preallocation is not Preallocation.OFF:
                end = write_tables(file, header)
            file.truncate(end)
            file.flush()
            if preallocation is Preallocation.FALLOC:
                reserve(fd, end + header.geometry.clusters * header.geometry.cluster_size)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(fd, mode & ~umask)
            # Before the file gets its name: a power cut must not leave a name without content. Not fdatasync, which
            # does not make the mode durable.
            os.fsync(fd)
        # link fails if the name exists; rename would replace the other file.
        os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    try:
        # After the link: otherwise a power cut could remove an overlay that we have reported as created.
        sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
