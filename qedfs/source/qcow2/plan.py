"""Plans a read of the virtual disk: which pieces of the file it needs.

Pure; must not know who reads, nor how many reads of the file that takes (`tables/reads.py`). `at` is a position in the
caller's buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from qedfs.source.qcow2.format import Packed, Qcow2Header, find_cluster
from qedfs.source.tables.reads import Data, Zeros, add_data, add_zeros


@dataclasses.dataclass(slots=True)
class Compressed:
    """A part of the buffer that comes from a compressed cluster: `want` of its bytes after the first `skip`."""

    at: int
    offset: int
    size: int  # of the compressed bytes
    skip: int
    want: int
    whole: bool  # the part is all that the disk has of the cluster


@dataclasses.dataclass(slots=True)
class Plan:
    """The parts of the buffer, by how they are filled."""

    zeros: list[Zeros] = dataclasses.field(default_factory=list)
    data: list[Data] = dataclasses.field(default_factory=list)
    compressed: list[Compressed] = dataclasses.field(default_factory=list)


def plan_read(header: Qcow2Header, pos: int, size: int, entries: Iterable[int]) -> Plan:
    """Plan a read of `size` bytes at `pos`. `entries`: the L2 entries of the clusters, from the one that `pos` is in.

    Raises:
        Fault: an entry is invalid.
    """
    plan = Plan()
    mask = header.cluster_size - 1
    at = 0
    for entry in entries:
        skip = (pos + at) & mask
        want = min(header.cluster_size - skip, size - at)
        place = find_cluster(header, entry)
        if place is None:
            add_zeros(plan.zeros, at, want)
        elif isinstance(place, Packed):
            whole = skip == 0 and (want == header.cluster_size or pos + at + want == header.size)
            plan.compressed.append(Compressed(at, place.offset, place.size, skip, want, whole))
        else:
            inside = max(0, min(want, header.file_size - place - skip))
            if inside:
                add_data(plan.data, at, place + skip, inside)
            if inside < want:
                add_zeros(plan.zeros, at + inside, want - inside)
        at += want
    return plan
