"""Recovery after a kill: decides whether a journal fits this overlay, and applies its entries to the map.

Owns that decision. A journal is found by the session id in the overlay. But a copy of the overlay has the same id, such
as a copy in a snapshot of the file system, or a restored older state. If a copy got an entry from the journal of its
original, the entry would refer to data that the copy does not have. So a journal is used as a whole or not at all, and
only if

- the file has the last entry that the session committed (the witness), which an older state lacks, as entries stay;
- every entry in it is possible in this file: its place is inside the file, and the cluster has no other place.

A journal that does not fit is not touched. One case goes unnoticed: a copy that was made after the last commit before
the kill, while a write was running to a place that was already inside the file.
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
    """Whether the journal belongs to this overlay in this state. Waits for the disk."""
    try:
        if orphan.witness and not _has(orphan.witness, header, clusters):
            return False
        return all(_can_be(pair, header, clusters, file_size) for pair in orphan.pairs)
    except BadOverlay:
        return False  # a table is invalid that was valid at the kill


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
    """The entry in the file."""
    if not clusters.has_table(cluster):
        return MISSING
    clusters.load_now(cluster)
    return clusters.entry(cluster)


def apply(pairs: Iterable[Pair], clusters: ClusterMap, tables: TableSlices, make_table: Callable[[int], None]) -> None:
    """Set these entries in the map. `make_table` makes sure that a cluster has a table.

    Raises NoMemory if they need more slices than a real session leaves. Forged entries may each need another slice.
    """
    for cluster, entry in pairs:
        tables.check_room()
        make_table(cluster)
        clusters.load_now(cluster)
        if clusters.entry(cluster) in (MISSING, ZERO):
            clusters.set(cluster, entry)
