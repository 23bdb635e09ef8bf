"""The qcow2 format for reading: header and table entries, judged. Numbers are of QEMU's docs/interop/qcow2.txt.

Owns what a header or an entry may say. Pure: no I/O, no trio; must not know who fetched the bytes or who wants them.
All input is taken for hostile: every offset is checked against the file's size, every count against a bound, before
anybody allocates or reads by it. What cannot be served is one `Fault` that names it.

A backing file or an external data file that the image names is never opened: the name comes from whoever wrote the
image, and following it would let an image on the network read this machine's files. Snapshots, bitmaps, reference
counts and header extensions are of no matter to a reader of the active state.

`pos` is a byte of the virtual disk, `offset` a byte of the qcow2 file.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from array import array

MAGIC = b"QFI\xfb"
HEADER_BYTES = 112  # as far as any field reaches that matters here; the header of version 2 ends at 72
MAX_L1_BYTES = 32 << 20  # QEMU's QCOW_MAX_L1_SIZE
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21  # QEMU's MIN_CLUSTER_BITS, MAX_CLUSTER_BITS
SECTOR_BYTES = 512  # the unit in which a compressed cluster's length is given
DEFLATE, ZSTD = 0, 1  # compression types

_FIXED = struct.Struct(">4sIQIIQIIQ")  # magic ... l1_table_offset, offsets 0 to 47
_V2_BYTES = 72
_V3_BYTES = 104  # without the compression type, which came later
_FEATURES_AT, _LENGTH_AT, _COMPRESSION_AT = 72, 100, 104

# Incompatible features. DIRTY: the reference counts may be wrong, which a reader does not need. CORRUPT: somebody has
# met a fault in it, and QEMU opens it for reading only; what is wrong with an entry shows when it is read.
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16
_KNOWN = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2

_COPIED = 1 << 63  # the reference count is 1; QEMU sets it on zero clusters, too
_COMPRESSED = 1 << 62
_READS_ZERO = 1  # since version 3
# Bits 9 to 55. The reserved bits around them are to be zero, and readers pass over them, as QEMU does.
_OFFSET = 0x00FF_FFFF_FFFF_FE00

_REMAKE = "make a plain one with qemu-img convert -O qcow2"


class Fault(Exception):
    """The image cannot be served; the message says what is wrong with it and does not name it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Qcow2Header:
    """What a reader needs of a header. `l1_entries`: how many entries `size` needs; the table may be longer."""

    version: int
    cluster_bits: int
    size: int  # bytes of the virtual disk
    l1_offset: int
    l1_entries: int
    compression: int  # DEFLATE or ZSTD
    file_size: int
    corrupt: bool = False  # marked so

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def table_bits(self) -> int:
        """An L2 table has 1 << table_bits entries of 8 bytes and fills one cluster."""
        return self.cluster_bits - 3


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """Where a compressed cluster is in the file. `size` may reach past its end into the next one's bytes."""

    offset: int
    size: int


def decode_header(data: bytes, file_size: int) -> Qcow2Header:
    """The header from the first `HEADER_BYTES` of the file (fewer if the file is shorter).

    Raises:
        Fault: it is none, is damaged, or asks for what is not supported.
    """
    if len(data) < _V2_BYTES or not data.startswith(MAGIC):
        raise Fault("is not a qcow2 image")
    _, version, backing_offset, backing_size, cluster_bits, size, crypt, l1_size, l1_offset = _FIXED.unpack_from(data)
    if version not in (2, 3):
        raise Fault(f"is a qcow image of version {version}; versions 2 and 3 are supported")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise Fault(f"has clusters of 2^{cluster_bits} bytes; 2^{MIN_CLUSTER_BITS} to 2^{MAX_CLUSTER_BITS} can be")
    compression = DEFLATE if version == 2 else _decode_features(data, 1 << cluster_bits)
    if crypt:
        raise Fault("is encrypted, which is not supported")
    if backing_offset and backing_size:
        raise Fault(f"has a backing file of its own, which is never followed; {_REMAKE}")
    if size >= 1 << 63:
        raise Fault(f"claims a size of {size} bytes")
    needed = -(-size >> (2 * cluster_bits - 3))
    _check_l1(needed, l1_size, l1_offset, cluster_bits, file_size)
    corrupt = version > 2 and bool(_features(data) & _CORRUPT)
    return Qcow2Header(version, cluster_bits, size, l1_offset, needed, compression, file_size, corrupt)


def _decode_features(data: bytes, cluster_size: int) -> int:
    """Judge what only version 3 has; returns the compression type."""
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
        raise Fault(f"has an L1 table of {l1_size} entries; {MAX_L1_BYTES // 8} can be")
    if needed > l1_size:
        raise Fault(f"has an L1 table of {l1_size} entries where its size needs {needed}")
    if l1_offset % (1 << cluster_bits):
        raise Fault(f"has its L1 table at {l1_offset:#x}, which is not at a cluster")
    if l1_offset + 8 * needed > file_size:
        raise Fault(f"has its L1 table at {l1_offset:#x}, outside of the file of {file_size} bytes")


def decode_table(data: bytes | bytearray | memoryview) -> array[int]:
    """Entries of an L1 or L2 table, which are big-endian in the file."""
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def has_table(entry: int) -> bool:
    """Whether an L1 entry names an L2 table."""
    return bool(entry & _OFFSET)


def table_offset(header: Qcow2Header, entry: int) -> int | None:
    """Where the L2 table of an L1 entry is; None: there is none, all of it is unallocated.

    Raises:
        Fault: the entry cannot be.
    """
    offset = entry & _OFFSET
    if offset == 0:
        return None
    if offset % header.cluster_size:
        raise Fault(f"has an L2 table at {offset:#x}, which is not at a cluster")
    if offset + header.cluster_size > header.file_size:
        raise Fault(f"has an L2 table at {offset:#x}, outside of the file of {header.file_size} bytes")
    return offset


def reads_zero(header: Qcow2Header, entry: int) -> bool:
    """Whether an L2 entry says, without fault, that its cluster is unallocated or zero."""
    if entry & _COMPRESSED:
        return False
    offset = entry & _OFFSET
    if entry & _READS_ZERO:
        return header.version >= 3 and offset % header.cluster_size == 0
    return offset == 0


def find_cluster(header: Qcow2Header, entry: int) -> int | Packed | None:
    """What an L2 entry says: the offset of the cluster's bytes, where they are compressed, or None for zeros.

    The cluster or its compressed bytes start inside the file and may reach past its end, as for QEMU's own check; what
    the file does not have of a cluster is zeros.

    Raises:
        Fault: the entry cannot be.
    """
    if reads_zero(header, entry):
        return None
    if entry & _COMPRESSED:
        return _find_packed(header, entry)
    if header.version < 3 and entry & _READS_ZERO:
        raise Fault(f"has the L2 entry {entry:#x}: a zero cluster, which version 2 does not have")
    offset = entry & _OFFSET
    if offset % header.cluster_size:
        raise Fault(f"has a cluster at {offset:#x}, which is not at a multiple of its size")
    if offset >= header.file_size:
        raise Fault(f"has a cluster at {offset:#x}, outside of the file of {header.file_size} bytes")
    return offset


def _find_packed(header: Qcow2Header, entry: int) -> Packed:
    # "Compressed Clusters Descriptor": the offset, above it the number of further sectors that the bytes reach into.
    offset_bits = 62 - (header.cluster_bits - 8)
    offset = entry & ((1 << offset_bits) - 1)
    sectors = (entry & (_COMPRESSED - 1)) >> offset_bits
    size = (sectors + 1) * SECTOR_BYTES - offset % SECTOR_BYTES
    if offset >= header.file_size:
        raise Fault(f"has a compressed cluster at {offset:#x}, outside of the file of {header.file_size} bytes")
    return Packed(offset, min(size, header.file_size - offset))
