"""What a killed session left in its journal: whether it fits this overlay, and how it comes into the map.

Owns the judgement. A journal is found by the session that the overlay carries, but a copy carries it too: a snapshot of
the file system, or an older state of the overlay that was put back in its place. An entry that a copy gets from the
journal of its original leads to a place that holds no data of it. So a journal is used as a whole or not at all, and
only if

- the file has the entry that the session brought in last (the witness): an older state lacks it, since entries stay;
- every pair can be an entry of this file: the place lies inside it, and the cluster has no other place in it.

One that does not fit is left alone. What this does not tell: a copy that was made after the last commit before the
kill, while a write was under way to a place that lay inside the file already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qedfs.errors import BadOverlay
from qedfs.format.header import Header
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.journal import OrphanJournal, Pair
from qedfs.overlay.table_slices import TableSlices


def fits(orphan: OrphanJournal, header: Header, clusters: ClusterMap, file_size: int) -> bool:
    """Whether this is a journal of this overlay in this state. Waits for the disk."""
    try:
        if orphan.witness and not _has(orphan.witness, header, clusters):
            return False
        return all(_can_be(pair, header, clusters, file_size) for pair in orphan.pairs)
    except BadOverlay:
        return False  # a table is bad that was good when the session ended


def _has(pair: Pair, header: Header, clusters: ClusterMap) -> bool:
    cluster, entry = pair
    return cluster < header.geometry.clusters and _entry(clusters, cluster) == entry


def _can_be(pair: Pair, header: Header, clusters: ClusterMap, file_size: int) -> bool:
    cluster, entry = pair
    return (
        cluster < header.geometry.clusters
        and entry % header.geometry.cluster_size == 0
        and header.area_bytes <= entry < file_size
        and _entry(clusters, cluster) in (MISSING, ZERO, entry)
    )


def _entry(clusters: ClusterMap, cluster: int) -> int:
    """The entry that the file has."""
    if not clusters.has_table(cluster):
        return MISSING
    clusters.load_now(cluster)
    return clusters.entry(cluster)


def apply(pairs: Iterable[Pair], clusters: ClusterMap, tables: TableSlices, make_table: Callable[[int], None]) -> None:
    """Let the map have these entries; `make_table` gives a cluster its table.

    NoMemory: they need more slices of tables than a session ever leaves. Invented ones may need a new one each.
    """
    for cluster, entry in pairs:
        tables.check_room()
        make_table(cluster)
        clusters.load_now(cluster)
        if clusters.entry(cluster) in (MISSING, ZERO):
            clusters.set(cluster, entry)
