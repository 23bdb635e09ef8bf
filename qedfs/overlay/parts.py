"""The parts of one open overlay, which `open.py` makes and everything that reads or changes the overlay shares.

Owns the list of them. Has no logic. The constructor of each class takes the parts that it works with from here.
"""

from __future__ import annotations

import dataclasses

from qedfs.overlay.allocator import Allocator
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.commit import Committer
from qedfs.overlay.freed import FreedClusters
from qedfs.overlay.loop_writes import LoopWrites
from qedfs.overlay.open_session import OpenSession
from qedfs.overlay.pending import PendingAllocations
from qedfs.overlay.room import Room
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.storage import Storage
from qedfs.overlay.table_slices import TableSlices


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one overlay."""

    storage: Storage
    session: OpenSession
    tables: TableSlices
    clusters: ClusterMap
    committer: Committer
    barriers: Barriers
    journal: SessionJournal
    allocator: Allocator
    pending: PendingAllocations
    freed: FreedClusters
    room: Room
    loop_writes: LoopWrites
