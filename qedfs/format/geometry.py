"""The geometry of a QED image: cluster, table and image sizes, and the numbers that follow from them.

Owns the limits of the format and the check of the three sizes. Must not know the other fields of a header
(`header.py`). Pure arithmetic on bytes and counts.
"""

from __future__ import annotations

import dataclasses

ENTRY_SIZE = 8  # bytes of one table entry, u64 little-endian
SECTOR_SIZE = 512  # bytes; a disk writes a sector atomically
MIN_CLUSTER_SIZE = 1 << 12
MAX_CLUSTER_SIZE = 1 << 26
MIN_TABLE_SIZE = 1  # clusters
MAX_TABLE_SIZE = 16
MAX_FILE_SIZE = (1 << 63) - 1  # off_t


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes, `table_size` in clusters (QED specification, section "Header")."""

    cluster_size: int
    table_size: int
    image_size: int

    @property
    def table_bytes(self) -> int:
        """Bytes of one table, L1 or L2."""
        return self.cluster_size * self.table_size

    @property
    def entries(self) -> int:
        """Entries of one table."""
        return self.table_bytes // ENTRY_SIZE

    @property
    def l2_span(self) -> int:
        """Bytes of the image that one L2 table maps."""
        return self.entries * self.cluster_size

    @property
    def clusters(self) -> int:
        """Clusters of the image, including a partial last one."""
        return -(-self.image_size // self.cluster_size)

    @property
    def l1_used(self) -> int:
        """L1 entries that map a part of the image. The entries after them are never used."""
        return -(-self.image_size // self.l2_span)

    @property
    def max_image_size(self) -> int:
        """The largest image, in bytes, that two levels of tables can map."""
        return self.entries * self.entries * self.cluster_size

    def fault(self) -> str | None:
        """What is wrong with these numbers, or None. The checks are those of QEMU's open, in the same order."""
        if not _power_between(self.cluster_size, MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE):
            return f"cluster size {self.cluster_size} is not a power of two from 4 KiB to 64 MiB"
        if not _power_between(self.table_size, MIN_TABLE_SIZE, MAX_TABLE_SIZE):
            return f"table size {self.table_size} is not a power of two from 1 to 16 clusters"
        if self.image_size % SECTOR_SIZE:
            return f"image size {self.image_size} is not a multiple of 512"
        if self.image_size > min(self.max_image_size, MAX_FILE_SIZE):
            return f"image size {self.image_size} is more than the tables can describe"
        return None


def _power_between(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0


def round_down(value: int, multiple: int) -> int:
    """The largest multiple of `multiple` that is not above `value`."""
    return value - value % multiple


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
