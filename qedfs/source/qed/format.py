"""What the header and the entries of a QED image mean to a reader, and which of them are refused.

Owns these rules; the layout of the bytes is that of every overlay (`qedfs/format`). Pure: no I/O, no trio; must not
know who fetched the bytes or who wants them. All input is considered hostile: every offset is checked against the size
of the file before it is used. As in QEMU, a cluster that the end of the file cuts off does not count.

If the image names a backing file, that file is never opened. The author of the image has chosen the name, so following
it would let an image on the network read this machine's files.

`pos` is a byte of the virtual disk, `offset` a byte of the QED file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from qedfs.errors import BadOverlay
from qedfs.format.geometry import round_down
from qedfs.format.header import Header, valid_table_offset
from qedfs.format.header import decode_header as decode
from qedfs.format.tables import MISSING, ZERO
from qedfs.source.tables.faults import Fault
from qedfs.source.tables.reads import Data, Zeros, add_data, add_zeros


def decode_header(data: bytes, file_size: int) -> Header:
    """Decode the header from the first 64 bytes of the file (fewer if the file is shorter).

    Raises:
        Fault: not a QED image, a damaged one, one with unknown features, or one with a backing file.
    """
    try:
        header = decode(data, file_size)
    except BadOverlay as exc:
        raise Fault(f"cannot be read as a QED image: {exc}") from exc
    if header.has_backing:
        raise Fault("has a backing file of its own, which is never followed; make one image of both: qemu-img convert")
    return header


def table_offset(header: Header, file_size: int, entry: int) -> int | None:
    """The offset of the L2 table that an L1 entry refers to; None without one.

    Raises:
        Fault: the entry is invalid.
    """
    if entry == MISSING:
        return None
    if not valid_table_offset(entry, header, file_size):
        raise Fault(f"has an L2 table at {entry:#x}, which is no place for one in a file of {file_size} bytes")
    return entry


def reads_zero(entry: int) -> bool:
    """Whether an L2 entry says that its cluster reads as zeros. A missing one does, as there is no backing."""
    return entry <= ZERO


@dataclasses.dataclass(slots=True)
class Plan:
    """The parts of a buffer, by how they are filled."""

    zeros: list[Zeros] = dataclasses.field(default_factory=list)
    data: list[Data] = dataclasses.field(default_factory=list)


def plan_read(header: Header, file_size: int, pos: int, size: int, entries: Iterable[int]) -> Plan:
    """Plan a read of `size` bytes at `pos`. `entries`: the L2 entries of the clusters, from the one that `pos` is in.

    Raises:
        Fault: an entry is invalid.
    """
    plan = Plan()
    cluster_size = header.geometry.cluster_size
    end = round_down(file_size, cluster_size)
    at = 0
    for entry in entries:
        skip = (pos + at) % cluster_size
        want = min(cluster_size - skip, size - at)
        if entry <= ZERO:
            add_zeros(plan.zeros, at, want)
        elif entry % cluster_size or not header.area_bytes <= entry < end:
            raise Fault(f"has a cluster at {entry:#x}, which is no place for one in a file of {file_size} bytes")
        else:
            add_data(plan.data, at, entry + skip, want)
        at += want
    return plan
