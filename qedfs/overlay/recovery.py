"""Recovery after a kill: decides whether a journal fits this overlay, and applies its entries to the map.

Owns that decision. Must not know how a journal is searched for or encoded (`journal_search.py`, `journal.py`). A
journal is found by the session id in the overlay. But a copy of the overlay has the same id, such as a copy in a
snapshot of the file system, or a restored older state. If a copy got an entry from the journal of its original, the
entry would refer to data that the copy does not have. So a journal is used as a whole or not at all, and only if

- the file has the last entry that the session committed (the witness), which an older state lacks, or one that followed
  it;
- every entry in it is possible in this file: its place is inside the file, unless a later entry of the cluster replaces
  it, as the place may have been freed and cut off since; and the cluster has no other place, unless a discard, a drop,
  a move or a later entry explains that.

A journal that does not fit is not touched. One case goes unnoticed: a copy that was made after the last commit before
the kill, if the journal has a place that was already inside the file. A write to it was running when the copy was made,
or has taken the place of a discarded cluster since.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from qedfs.errors import BadOverlay
from qedfs.format.header import Header
from qedfs.format.tables import MISSING, ZERO
from qedfs.overlay.allocator import Allocator
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.journal import OrphanJournal, Pair, is_drop, is_move, place_of, run_count
from qedfs.overlay.table_slices import TableSlices

# Clusters whose entry in the file the journal has to explain. A group that ran at the kill may leave as many.
MOST_UNEXPLAINED = 1 << 20


def fits(orphan: OrphanJournal, header: Header, clusters: ClusterMap, file_size: int) -> bool:
    """Whether the journal belongs to this overlay in this state. Waits for the disk."""
    try:
        unexplained = dict(_unexplained(orphan.pairs, header, clusters, file_size))
        if orphan.witness is not None:
            cluster, entry = orphan.witness
            if cluster >= header.geometry.clusters or (
                (found := _entry(clusters, cluster)) not in _left_by(entry)
                and not _follows(orphan.pairs, cluster, found)
            ):
                return False
        return not unexplained or _explained(orphan.pairs, unexplained)
    except (BadOverlay, _Misfit):
        return False  # the first: a table is invalid that was valid at the kill


def _left_by(entry: int) -> tuple[int, ...]:
    """What the file may have for the first cluster of this entry, once that is committed."""
    if is_drop(entry):
        return MISSING, ZERO  # zeros that were fetched since are in no journal (`adoption.py`)
    return (ZERO,) if run_count(entry) else (place_of(entry),)


class _Misfit(Exception):
    """No session of this overlay can have made this entry."""


def _unexplained(
    pairs: Iterable[Pair], header: Header, clusters: ClusterMap, file_size: int
) -> Iterator[tuple[int, int]]:
    """The clusters that have another place in the file than in the journal, with their entry in the file."""
    geometry = header.geometry
    count = 0
    cut_off: set[int] = set()  # clusters whose last place so far is past the end of the file
    for cluster, entry in pairs:
        run = run_count(entry)
        if cluster + (run or 1) > geometry.clusters:
            raise _Misfit
        if run:
            cut_off.difference_update(_among(cut_off, range(cluster, cluster + run)))
            continue  # any cluster may be discarded or dropped
        place = place_of(entry)
        if place % geometry.cluster_size or place < header.area_bytes:
            raise _Misfit
        if place < file_size:
            cut_off.discard(cluster)
        else:
            cut_off.add(cluster)
            if len(cut_off) > MOST_UNEXPLAINED:
                raise _Misfit
        if (found := _entry(clusters, cluster)) not in (MISSING, ZERO, place):
            count += 1
            if count > MOST_UNEXPLAINED:
                raise _Misfit
            yield cluster, found
    if cut_off:
        raise _Misfit


def _among(clusters: Collection[int], covered: range) -> list[int]:
    """Those of the clusters that this range covers."""
    if len(clusters) < len(covered):
        return [number for number in clusters if number in covered]
    return [number for number in covered if number in clusters]


def _explained(pairs: Iterable[Pair], found: dict[int, int]) -> bool:
    """Whether the journal explains these entries of the file: as later ones, or as what was given up before all others.

    An entry never changes from one place to another without a move, or a discard or a drop in between.
    """
    left = dict(found)
    placed: set[int] = set()  # clusters with an earlier place in the journal
    for cluster, entry in pairs:
        if count := run_count(entry):
            for number in _among(left, range(cluster, cluster + count)):
                if number not in placed:
                    del left[number]
        elif cluster in left:
            if left[cluster] == place_of(entry) or (is_move(entry) and cluster not in placed):
                del left[cluster]
            placed.add(cluster)
    return not left


def _follows(pairs: Iterable[Pair], cluster: int, found: int) -> bool:
    """Whether the journal has this entry for the cluster. The kill came while a group was being written."""
    for first, entry in pairs:
        if count := run_count(entry):
            if found in _left_by(entry) and first <= cluster < first + count:
                return True
        elif (first, place_of(entry)) == (cluster, found):
            return True
    return False


def _entry(clusters: ClusterMap, cluster: int) -> int:
    """The entry in the file."""
    if not clusters.has_table(cluster):
        return MISSING
    clusters.load_now(cluster)
    return clusters.entry(cluster)


def apply(
    pairs: Iterable[Pair], clusters: ClusterMap, tables: TableSlices, allocator: Allocator, *, backing: bool
) -> None:
    """Set these entries in the map, in their order. Without a `backing`, missing clusters read as zeros already.

    Raises NoMemory if they need more slices than a real session leaves. Forged entries may each need another slice.
    """
    for cluster, entry in pairs:
        tables.check_room()
        if count := run_count(entry):
            if is_drop(entry):
                _apply_drop(cluster, count, clusters, tables)
            else:
                _apply_zeros(cluster, count, clusters, tables, allocator, backing=backing)
            continue
        allocator.make_table(cluster)
        clusters.load_now(cluster)
        if _takes_effect(entry, clusters.entry(cluster)):
            clusters.set(cluster, place_of(entry))


def _takes_effect(entry: int, found: int) -> bool:
    """Whether a place in the journal replaces this entry of the file, which may be of a later write."""
    return is_move(entry) or found in (MISSING, ZERO)


def _apply_zeros(
    cluster: int, count: int, clusters: ClusterMap, tables: TableSlices, allocator: Allocator, *, backing: bool
) -> None:
    stop = cluster + count
    while cluster < stop:
        end = min(stop, (cluster // clusters.slice_entries + 1) * clusters.slice_entries)
        tables.check_room()
        if backing:
            allocator.make_table(cluster)
        if clusters.has_table(cluster):
            clusters.load_now(cluster)
            clusters.discard(cluster, end - cluster, missing_too=backing)  # its data leaks until a repair
        cluster = end


def _apply_drop(cluster: int, count: int, clusters: ClusterMap, tables: TableSlices) -> None:
    stop = cluster + count
    while cluster < stop:
        end = min(stop, (cluster // clusters.slice_entries + 1) * clusters.slice_entries)
        tables.check_room()
        if clusters.has_table(cluster):
            clusters.load_now(cluster)
            clusters.drop(range(cluster, end), {})  # their data leaks until a repair
        cluster = end
