"""The QED header: 64 bytes at offset 0, followed by the backing name in the header clusters.

Owns the layout, the feature bits, and the checks that a header must pass. No I/O: the caller supplies the bytes and the
length of the file.
"""

from __future__ import annotations

import dataclasses
import struct

from qedfs.errors import BadOverlay
from qedfs.format.geometry import Geometry, round_down

HEADER_BYTES = 64
MAGIC = b"QED\0"
_LAYOUT = struct.Struct("<4sIIIQQQQQII")

BACKING_FILE = 0x1  # incompatible: the backing name is valid
NEED_CHECK = 0x2  # incompatible: the tables may be inconsistent
NO_PROBE = 0x4  # incompatible: the backing is raw, do not probe its format
KNOWN_FEATURES = BACKING_FILE | NEED_CHECK | NO_PROBE

# Autoclear: no other program has written to this overlay since qedfs set the bit. When QEMU opens a file for writing,
# it clears every autoclear bit that it does not know. QEMU has defined no autoclear bits so far; bit 47 is far from the
# low bits, which it would presumably use first.
UNTOUCHED = 1 << 47

MAX_BACKING_NAME = 4095  # bytes; with the terminating NUL, QEMU's PATH_MAX (4096)


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """The fields as stored in the file. Offsets and sizes are in bytes, except `header_size`, which is in clusters."""

    geometry: Geometry
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_table_offset: int
    backing_name_offset: int
    backing_name_size: int

    @property
    def area_bytes(self) -> int:
        """The size of the header clusters in bytes. All tables and data lie at higher offsets."""
        return self.header_size * self.geometry.cluster_size

    @property
    def has_backing(self) -> bool:
        """Whether there is a backing name. An empty one does not count, as in QEMU."""
        return bool(self.features & BACKING_FILE) and self.backing_name_size > 0

    @property
    def dirty(self) -> bool:
        """Whether NEED_CHECK is set, so that the overlay must be checked and repaired before it is served writable."""
        return bool(self.features & NEED_CHECK)

    def encode(self) -> bytes:
        """The 64 bytes as stored in the file."""
        return _LAYOUT.pack(
            MAGIC,
            self.geometry.cluster_size,
            self.geometry.table_size,
            self.header_size,
            self.features,
            self.compat_features,
            self.autoclear_features,
            self.l1_table_offset,
            self.geometry.image_size,
            self.backing_name_offset,
            self.backing_name_size,
        )

    def without_backing(self) -> Header:
        """The header of an overlay without a backing, as QEMU writes it after a stream: name offset 64, name size 0."""
        return dataclasses.replace(
            self,
            features=self.features & ~(BACKING_FILE | NO_PROBE),
            backing_name_offset=HEADER_BYTES,
            backing_name_size=0,
        )


def decode_header(data: bytes, file_size: int) -> Header:
    """Decode and check a header.

    Args:
        data: at least the first 64 bytes of the file.
        file_size: length of the file in bytes. A partial cluster at its end is ignored.

    Raises:
        BadOverlay: not QED, unknown incompatible features, or invalid numbers.
    """
    if len(data) < HEADER_BYTES:
        raise BadOverlay("not a QED image: the file is shorter than a header")
    magic, cluster, table, header_size, features, compat, autoclear, l1, size, name_at, name_size = _LAYOUT.unpack(
        data[:HEADER_BYTES]
    )
    if magic != MAGIC:
        raise BadOverlay("not a QED image")
    if features & ~KNOWN_FEATURES:
        raise BadOverlay(f"needs features that this version does not know: {features & ~KNOWN_FEATURES:#x}")
    header = Header(Geometry(cluster, table, size), header_size, features, compat, autoclear, l1, name_at, name_size)
    fault = header.geometry.fault() or _placement_fault(header, file_size)
    if fault:
        raise BadOverlay(fault)
    return header


def _placement_fault(header: Header, file_size: int) -> str | None:
    # With header_size 0, which QEMU accepts, offset 0 would be a legal cluster, and a write to it would destroy the
    # header.
    if header.header_size < 1 or header.area_bytes >= 1 << 32:
        return f"header size {header.header_size} clusters is out of range"
    if not valid_table_offset(header.l1_table_offset, header, file_size):
        return f"the L1 table at {header.l1_table_offset:#x} is not inside the file"
    if header.has_backing:
        end = header.backing_name_offset + header.backing_name_size
        if header.backing_name_offset < HEADER_BYTES or end > header.area_bytes:
            return "the backing name is not inside the header"
        if header.backing_name_size > MAX_BACKING_NAME:
            return f"the backing name is longer than {MAX_BACKING_NAME} bytes"
    return None


def valid_table_offset(offset: int, header: Header, file_size: int) -> bool:
    """Whether `offset` is aligned to a cluster and past the header, and a whole table fits into the file there."""
    geometry = header.geometry
    end = round_down(file_size, geometry.cluster_size)
    return offset % geometry.cluster_size == 0 and header.area_bytes <= offset <= end - geometry.table_bytes


def decode_backing_name(data: bytes) -> str:
    """The backing name as text.

    Raises:
        BadOverlay: it is not UTF-8, or contains a NUL. (QEMU would truncate the name at the NUL and open another file.)
    """
    try:
        name = data.decode()
    except UnicodeDecodeError as exc:
        raise BadOverlay("the backing name is not UTF-8") from exc
    if "\0" in name:
        raise BadOverlay("the backing name contains a NUL byte")
    return name
