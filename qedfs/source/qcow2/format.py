"""Decoding and validation of qcow2 headers and table entries (QEMU's docs/interop/qcow2.txt).

Owns the rules for headers and entries. Pure: no I/O, no trio; must not know who fetched the bytes or who wants them.
All input is considered hostile: every offset is checked against the size of the file, and every count against a bound,
before it is used to allocate or read. Whatever cannot be served raises a `Fault` that says why.

If the image names a backing file or an external data file, that file is never opened. The author of the image has
chosen the name, so following it would let an image on the network read this machine's files. Snapshots, bitmaps,
reference counts and header extensions do not matter for reading the active state.

`pos` is a byte of the virtual disk, `offset` a byte of the qcow2 file.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from array import array

from qedfs.source.tables.faults import Fault

MAGIC = b"QFI\xfb"
HEADER_BYTES = 112  # includes all the fields that matter here; the header of version 2 ends at 72
MAX_L1_BYTES = 32 << 20  # QEMU's QCOW_MAX_L1_SIZE
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21  # QEMU's MIN_CLUSTER_BITS, MAX_CLUSTER_BITS
SECTOR_BYTES = 512  # the unit of a compressed cluster's length
DEFLATE, ZSTD = 0, 1  # compression types

_FIXED = struct.Struct(">4sIQIIQIIQ")  # magic ... l1_table_offset, offsets 0 to 47
_V2_BYTES = 72
_V3_BYTES = 104  # without the compression type, which was added later
_FEATURES_AT, _LENGTH_AT, _COMPRESSION_AT = 72, 100, 104

# Incompatible features. DIRTY: the reference counts may be wrong, but a reader does not need them. CORRUPT: a program
# has found a fault, and QEMU opens the image read-only; we validate every entry that we use anyway.
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16
_KNOWN = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2

_COPIED = 1 << 63  # the reference count is 1; QEMU sets it on zero clusters, too
_COMPRESSED = 1 << 62
_READS_ZERO = 1  # since version 3
# Bits 9 to 55. The reserved bits around them should be zero, and are ignored, as in QEMU.
_OFFSET = 0x00FF_FFFF_FFFF_FE00

_REMAKE = "make a plain one with qemu-img convert -O qcow2"


@dataclasses.dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The fields of a header that a reader needs. `l1_entries`: as many as `size` needs; the table may be longer."""

    version: int
    cluster_bits: int
    size: int  # bytes of the virtual disk
    l1_offset: int
    l1_entries: int
    compression: int  # DEFLATE or ZSTD
    file_size: int
    corrupt: bool = False  # the image is marked as corrupt

    @property
    def cluster_size(self) -> int:
        """Cluster size in bytes."""
        return 1 << self.cluster_bits

    @property
    def table_bits(self) -> int:
        """Binary logarithm of the number of entries in an L2 table, which fills one cluster."""
        return self.cluster_bits - 3


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """Where a compressed cluster is in the file. `size` is rounded up and may include bytes of the next one."""

    offset: int
    size: int


def decode_header(data: bytes, file_size: int) -> Qcow2Header:
    """Decode the header from the first `HEADER_BYTES` of the file (fewer if the file is shorter).

    Raises:
        Fault: not a qcow2 image, a damaged one, or one with unsupported features.
    """
    if len(data) < _V2_BYTES or not data.startswith(MAGIC):
        raise Fault("is not a qcow2 image")
    _, version, backing_offset, backing_size, cluster_bits, size, crypt, l1_size, l1_offset = _FIXED.unpack_from(data)
    if version not in (2, 3):
        raise Fault(f"is a qcow image of version {version}; versions 2 and 3 are supported")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise Fault(f"has clusters of 2^{cluster_bits} bytes, not 2^{MIN_CLUSTER_BITS} to 2^{MAX_CLUSTER_BITS}")
    compression = DEFLATE if version == 2 else _decode_features(data, 1 << cluster_bits)
    if crypt:
        raise Fault(f"is encrypted, which is not supported; {_REMAKE}")
    if backing_offset and backing_size:
        raise Fault(f"has a backing file of its own, which is never followed; {_REMAKE}")
    if size >= 1 << 63:
        raise Fault(f"claims a size of {size} bytes")
    needed = -(-size >> (2 * cluster_bits - 3))
    _check_l1(needed, l1_size, l1_offset, cluster_bits, file_size)
    corrupt = version > 2 and bool(_features(data) & _CORRUPT)
    return Qcow2Header(version, cluster_bits, size, l1_offset, needed, compression, file_size, corrupt)


def _decode_features(data: bytes, cluster_size: int) -> int:
    """Check the fields that only version 3 has. Returns the compression type."""
    if len(data) < _V3_BYTES:
        raise Fault("ends inside its header")
    features = _features(data)
    (length,) = struct.unpack_from(">I", data, _LENGTH_AT)
    if not _V3_BYTES <= length <= cluster_size:
        raise Fault(f"has a header of {length} bytes")
    if features & _DATA_FILE:
        raise Fault(f"keeps its data in an external file, which is never followed; {_REMAKE}")
    if features & _EXTENDED_L2:
        raise Fault(f"has subclusters (extended_l2), which are not supported; {_REMAKE}")
    if features & ~_KNOWN:
        raise Fault(f"needs unknown features ({features & ~_KNOWN:#x})")
    return _decode_compression(data, length, marked=bool(features & _COMPRESSION))


def _features(data: bytes) -> int:
    features: int = struct.unpack_from(">Q", data, _FEATURES_AT)[0]
    return features


def _decode_compression(data: bytes, length: int, *, marked: bool) -> int:
    compression = data[_COMPRESSION_AT] if min(length, len(data)) > _COMPRESSION_AT else DEFLATE
    if marked != (compression != DEFLATE):
        raise Fault(f"contradicts itself about its compression type ({compression})")
    if compression not in (DEFLATE, ZSTD):
        raise Fault(f"has the unknown compression type {compression}")
    return compression


def _check_l1(needed: int, l1_size: int, l1_offset: int, cluster_bits: int, file_size: int) -> None:
    if 8 * l1_size > MAX_L1_BYTES:
        raise Fault(f"has an L1 table of {l1_size} entries; the limit is {MAX_L1_BYTES // 8}")
    if needed > l1_size:
        raise Fault(f"has an L1 table of {l1_size} entries but needs {needed} for its size")
    if l1_offset % (1 << cluster_bits):
        raise Fault(f"has its L1 table at {l1_offset:#x}, which is not the start of a cluster")
    if l1_offset + 8 * needed > file_size:
        raise Fault(
            f"has its L1 table at {l1_offset:#x}, outside the file of {file_size} bytes; is the file there as a whole?"
        )


def decode_table(data: bytes | bytearray | memoryview) -> array[int]:
    """Decode the entries of an L1 or L2 table, which are big-endian in the file."""
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def table_offset(header: Qcow2Header, entry: int) -> int | None:
    """The offset of the L2 table that an L1 entry refers to; None if the whole table is unallocated.

    Raises:
        Fault: the entry is invalid.
    """
    offset = entry & _OFFSET
    if offset == 0:
        return None
    if offset % header.cluster_size:
        raise Fault(f"has an L2 table at {offset:#x}, which is not the start of a cluster")
    if offset + header.cluster_size > header.file_size:
        raise Fault(f"has an L2 table at {offset:#x}, outside the file of {header.file_size} bytes")
    return offset


def reads_zero(header: Qcow2Header, entry: int) -> bool:
    """Whether an L2 entry is valid and says that its cluster is unallocated or zero."""
    if entry & _COMPRESSED:
        return False
    offset = entry & _OFFSET
    if entry & _READS_ZERO:
        return header.version >= 3 and offset % header.cluster_size == 0
    return offset == 0


def find_cluster(header: Qcow2Header, entry: int) -> int | Packed | None:
    """Decode an L2 entry: the offset of the cluster, the place of its compressed bytes, or None for zeros.

    The cluster or its compressed bytes must start inside the file but may reach past its end, as in QEMU's own check.
    The missing part of a cluster reads as zeros.

    Raises:
        Fault: the entry is invalid.
    """
    if reads_zero(header, entry):
        return None
    if entry & _COMPRESSED:
        return _find_packed(header, entry)
    if header.version < 3 and entry & _READS_ZERO:
        raise Fault(f"has the L2 entry {entry:#x}: a zero cluster, which version 2 does not have")
    offset = entry & _OFFSET
    if offset % header.cluster_size:
        raise Fault(f"has a cluster at {offset:#x}, which is not a multiple of its size")
    if offset >= header.file_size:
        raise Fault(f"has a cluster at {offset:#x}, outside the file of {header.file_size} bytes")
    return offset


def _find_packed(header: Qcow2Header, entry: int) -> Packed:
    # "Compressed Clusters Descriptor": the offset, and in the bits above it the number of additional sectors.
    offset_bits = 62 - (header.cluster_bits - 8)
    offset = entry & ((1 << offset_bits) - 1)
    sectors = (entry & (_COMPRESSED - 1)) >> offset_bits
    size = (sectors + 1) * SECTOR_BYTES - offset % SECTOR_BYTES
    if offset >= header.file_size:
        raise Fault(f"has a compressed cluster at {offset:#x}, outside the file of {header.file_size} bytes")
    return Packed(offset, min(size, header.file_size - offset))
