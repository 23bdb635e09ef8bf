"""Overlays for tests, built entry by entry. Knows no behaviour of qedfs: what is built may be as wrong as one wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qedfs.format.geometry import Geometry
from qedfs.format.header import BACKING_FILE, NO_PROBE, Header

BACKING = b"base.raw"


@dataclasses.dataclass
class Built:
    """An overlay under construction: L1 behind the header clusters, then the L2 tables, then data clusters."""

    header: Header
    data: bytearray

    def put_u64(self, offset: int, value: int) -> None:
        """Write one table entry."""
        self.data[offset : offset + 8] = value.to_bytes(8, "little")

    def replace(self, **fields: object) -> None:
        """Change fields of the header."""
        self.header = dataclasses.replace(self.header, **fields)  # type: ignore[arg-type]
        self.data[: len(self.header.encode())] = self.header.encode()


def empty(
    *, cluster_size: int = 4096, table_size: int = 1, image_size: int = 1 << 20, backing: bytes = BACKING
) -> Built:
    """An overlay without clusters and without L2 tables; one header cluster (two if they are small)."""
    geometry = Geometry(cluster_size, table_size, image_size)
    header_size = 2 if cluster_size < 8192 else 1
    features = BACKING_FILE | NO_PROBE if backing else 0
    header = Header(geometry, header_size, features, 0, 0, header_size * cluster_size, 64, len(backing))
    data = bytearray(header.area_bytes + geometry.table_bytes)
    data[:64] = header.encode()
    data[64 : 64 + len(backing)] = backing
    return Built(header, data)


def filled(
    clusters: Mapping[int, bytes | int],
    *,
    cluster_size: int = 4096,
    table_size: int = 1,
    image_size: int = 1 << 20,
    backing: bytes = BACKING,
) -> Built:
    """An overlay with these clusters: bytes become a data cluster, numbers are stored as the entry.

    The data clusters lie in the order of the mapping, behind the L2 tables.
    """
    built = empty(cluster_size=cluster_size, table_size=table_size, image_size=image_size, backing=backing)
    shape = built.header.geometry
    for index in sorted({cluster // shape.entries for cluster in clusters}):
        built.put_u64(built.header.l1_table_offset + 8 * index, len(built.data))
        built.data += bytes(shape.table_bytes)
    for cluster, content in clusters.items():
        l1 = built.header.l1_table_offset + 8 * (cluster // shape.entries)
        table = int.from_bytes(built.data[l1 : l1 + 8], "little")
        entry = content if isinstance(content, int) else len(built.data)
        if not isinstance(content, int):
            built.data += content.ljust(shape.cluster_size, b"\0")
        built.put_u64(table + 8 * (cluster % shape.entries), entry)
    return built


SPAN = 2 << 20  # of one table of 512 entries, at clusters of 4 KiB


def many_tables(count: int) -> Built:
    """One data cluster at the start of each of `count` L2 tables."""
    return filled({index * 512: bytes([index + 1]) * 4096 for index in range(count)}, image_size=count * SPAN)
