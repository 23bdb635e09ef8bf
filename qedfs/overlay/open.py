"""Opens an overlay: validates and repairs it, replays the journal of a killed session, and starts a new session.

Owns the order of these steps. Must not know what an open overlay is used for. Everything waits for the disk, in a
thread.
"""

from __future__ import annotations

import logging
from pathlib import Path

from qedfs.errors import BadOverlay, InUse, NoMemory
from qedfs.format.geometry import round_down, round_up
from qedfs.format.header import NEED_CHECK
from qedfs.format.record import Standby
from qedfs.format.sparse import SparseTable
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share
from qedfs.overlay.allocator import Allocator
from qedfs.overlay.barrier import Barriers
from qedfs.overlay.check import repair
from qedfs.overlay.clustermap import ClusterMap
from qedfs.overlay.commit import Committer
from qedfs.overlay.freed import FreedClusters
from qedfs.overlay.journal import OrphanJournal
from qedfs.overlay.journal_search import Found, find
from qedfs.overlay.l1 import read_l1
from qedfs.overlay.loop_writes import LoopWrites
from qedfs.overlay.open_session import OpenSession
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.parts import Parts
from qedfs.overlay.pending import PendingAllocations
from qedfs.overlay.recovery import apply, fits
from qedfs.overlay.references import References
from qedfs.overlay.revalidation import revalidate
from qedfs.overlay.room import Room
from qedfs.overlay.session import Session, read_header, read_record
from qedfs.overlay.session_journal import SessionJournal
from qedfs.overlay.session_start import SessionStart
from qedfs.overlay.storage import FileStorage, Storage
from qedfs.overlay.table_slices import TableSlices
from qedfs.overlay.truncation import mark_beyond
from qedfs.overlay.truncation_marks import TruncationMarks

log = logging.getLogger(__name__)


async def open_overlay(
    path: str,
    *,
    writable: bool,
    locked: bool = True,
    journal_folder: Path | None = None,
    dir_fd: int | None = None,
    session_prefix: str = "",
) -> Overlay:
    """Open the overlay file at `path`, see `FileStorage.open` and `open_storage`. Errors name the path."""
    storage = FileStorage.open(path, writable=writable, locked=locked, dir_fd=dir_fd)
    try:
        overlay = await open_storage(storage, journal_folder=journal_folder, session_prefix=session_prefix)
    except (BadOverlay, InUse, NoMemory) as exc:
        storage.close()
        raise type(exc)(f"{path}: {exc}") from exc
    except BaseException:
        storage.close()
        raise
    if overlay.journal_remark:
        log.warning("%s: %s", path, overlay.journal_remark)
    if overlay.full is not None:
        log.warning("%s; nothing is written or kept until there is space", overlay.full)
    return overlay


async def open_storage(storage: Storage, *, journal_folder: Path | None = None, session_prefix: str = "") -> Overlay:
    """Read and validate the overlay. If it is writable, repair it, replay its journal and start a session.

    On a full disk the session starts later (`session_start.py`), and operations that need it raise NoSpace until then.
    A read-only overlay shows the entries of a killed session's journal, but does not remove the journal.

    `journal_folder`: on a tmpfs. If None, writes to new clusters are acknowledged only after a group commit.
    `session_prefix`: the beginning of the id of the session (`Session`).

    Raises:
        BadOverlay: the overlay cannot be served. Nothing has been written to it.
        NoMemory: its tables do not fit into memory together with those of other overlays.
        InUse: a killed session may have a journal that we may not read. Nothing has been written to the overlay.
    """
    share = Share(memory_pool.TABLES)
    try:
        return await storage.in_thread(lambda: _open(storage, journal_folder, share, session_prefix))
    except BaseException:
        share.close()
        raise


def _open(  # noqa: C901 - its steps
    storage: Storage, journal_folder: Path | None, share: Share, session_prefix: str
) -> Overlay:
    if storage.locked:  # otherwise a mount may be writing to it, and the page cache has what that mount serves
        revalidate(storage, journal_folder)
    header, backing = read_header(storage)
    journal = SessionJournal()
    barriers = Barriers(storage, journal)
    record = read_record(storage, header)
    session = Session(storage, header, record, barrier=barriers.barrier, prefix=session_prefix)
    found_mark = session.mark()
    found = find(storage, journal_folder, session.record.session, session.record.journal)
    if emptying := session.record.standby is Standby.EMPTYING:
        found = _emptied(found, session, writable=storage.writable)
    remark = _unread(found, session, writable=storage.writable)
    if storage.writable:
        session.finish_detach()
    if storage.writable and header.dirty:
        repair(storage, header)
        session.clear_dirty(NEED_CHECK)
    l1_used = header.geometry.l1_used
    l1 = SparseTable(l1_used) if emptying else read_l1(storage, header.l1_table_offset, l1_used, share)
    # After the read: if a mount writes to the file meanwhile, it is then long enough for every table in this L1.
    file_end = storage.size()
    cluster_size = header.geometry.cluster_size
    # Anything past the last whole cluster is ignored.
    marks = TruncationMarks(storage, barriers)
    tables = TableSlices(storage, header, l1, file_end=round_down(file_end, cluster_size), share=share, marks=marks)
    clusters = ClusterMap(tables, header)
    allocator = Allocator(storage, tables)
    references = References(tables, clusters, header, path=storage.path, file_size=file_end)
    freed = FreedClusters(storage, cluster_size, barriers, allocator, references)
    committer = Committer(storage, session.header, tables, journal=journal, barriers=barriers, marks=marks, freed=freed)
    if storage.writable:
        _mark_cut_tables(tables, committer)
    orphan = found.orphan
    if orphan and (not session.untouched or not fits(orphan, session.header, clusters, storage.size())):
        remark, orphan = _not_used(orphan, session), None
    if storage.writable or orphan:
        # Allocate only past the end of the file, where a killed session may have left a partial cluster.
        tables.reach(round_up(file_end, cluster_size))
    if orphan:
        # The file may have some of these entries already.
        apply(orphan.pairs, clusters, tables, allocator, backing=backing is not None)
    session_start = None
    if storage.writable:
        killed = bool(session.record.session)
        session_start = SessionStart(storage, session, committer, journal, journal_folder, orphan)
        session_start.at_open()
        # Not if the old journal still counts. It may refer to what looks like a leak.
        if killed and session_start.full is None:
            references.begin()
    parts = Parts(
        storage=storage,
        session=OpenSession(storage, session, committer, barriers, journal, session_start),
        tables=tables,
        clusters=clusters,
        committer=committer,
        barriers=barriers,
        journal=journal,
        allocator=allocator,
        pending=PendingAllocations(clusters),
        freed=freed,
        room=Room(committer, freed),
        loop_writes=LoopWrites(storage.would_wait),
    )
    remark = remark if storage.locked else ""
    return Overlay(parts, backing=backing, journal_remark=remark, found_mark=found_mark)


def _emptied(found: Found, session: Session, *, writable: bool) -> Found:
    """Finish what a kill or a power cut has interrupted: whatever file and journal have, the overlay is empty."""
    if writable:
        if found.orphan:
            found.orphan.remove()
        session.empty()
    return Found()


def _unread(found: Found, session: Session, *, writable: bool) -> str:
    """What to tell the user about a journal that was not read.

    Raises:
        InUse: a new session would void the journal.
    """
    if found.gone:
        return f"{found.gone}; writes that were acknowledged just before, and not flushed, may be lost"
    if not found.unread or not session.untouched:
        return ""  # another program has written since, so the journal is void anyway
    if not writable:
        return f"{found.unread}; writes that were acknowledged just before may be missing here"
    raise InUse(
        f"{found.unread}; mount it once as that user, which restores the writes that were acknowledged just before, or "
        "give them up with qedfs check --drop-journal"
    )


def _not_used(orphan: OrphanJournal, session: Session) -> str:
    if session.untouched:
        return f"{orphan.path} is of another state of this overlay, and is not used"
    if not orphan.data:
        return ""
    return (
        f"another program has written to it after a mount of it was killed; the writes that only {orphan.path} holds "
        "are lost"
    )


def _mark_cut_tables(tables: TableSlices, committer: Committer) -> None:
    """Mark the L1 entries of tables that are not entirely inside the file, before it grows. See `truncation.py`."""
    first_bad = tables.file_end - tables.geometry.table_bytes + 1
    for first, page in tables.l1.filled_pages():
        if cut := mark_beyond(page, first_bad, tables.geometry.cluster_size):
            committer.mark_l1(first + index for index in cut)
