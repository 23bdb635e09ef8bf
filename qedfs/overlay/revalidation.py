"""Decides, when an overlay is opened, whether the page cache can be trusted or must be evicted first.

After a failed write-back, the page cache shows tables and data that the disk lacks, and nothing distinguishes them from
the rest (`pagecache.py`). A session that ends cleanly says so in its record, after its last barrier. After a failed
barrier, or a kill (before or after the kernel has noticed an error), there is no such note. After a write by QEMU the
note no longer counts, because QEMU has cleared the autoclear bit that vouches for it. In all these cases the page cache
is evicted. So nothing has to be stored to express distrust; a failing disk might not store it.

The journal of a killed session refers to data that may have been only in the page cache. The kernel reports lost data
only once, to the first process that asks, which may be another program. Therefore that data is read twice, from the
page cache and from the disk, and compared. One case goes unnoticed: data that was lost, reported to another program,
and dropped from the page cache before the overlay was opened.

Must not know what is read afterwards.
"""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

from qedfs.errors import InUse, QedfsError
from qedfs.overlay.journal import OrphanJournal, place_of, run_count
from qedfs.overlay.journal_search import find
from qedfs.overlay.session import Session, read_header, read_record
from qedfs.overlay.storage import Storage


def revalidate(storage: Storage, journal_folder: Path | None) -> None:
    """Make sure that reads show what is on the disk. Waits for the disk. The caller holds the locks of the overlay.

    Raises:
        BadOverlay: the overlay cannot be served.
        InUse: another program keeps pages of the file in memory.
        QedfsError: the disk lacks data that was written before the kill. The journal is removed, because the data that
            it refers to may be lost, and the clusters that it adds would then read as garbage.
    """
    header, _ = read_header(storage)
    session = Session(storage, header, read_record(storage, header))
    if session.ended_in_order:
        return
    found = find(storage, journal_folder, session.record.session, session.record.journal)
    if found.unread and session.untouched:
        # Do not evict: the journal's data may be only in the page cache. That is safe, because no session starts before
        # the journal has been read.
        return
    orphan = found.orphan if session.untouched else None
    try:
        _refresh(storage, orphan, header.geometry.cluster_size)
    except InUse:
        raise
    except QedfsError as exc:
        if orphan:
            orphan.remove()
        raise QedfsError(
            f"{exc}: writes that were acknowledged before a crash, but not flushed, are lost; open it again to go on "
            "with what is on the disk"
        ) from exc


def _refresh(storage: Storage, orphan: OrphanJournal | None, cluster_size: int) -> None:
    """Evict the page cache. Raises QedfsError if clusters that the journal refers to may not be on the disk."""
    before = _checksum(storage, orphan, cluster_size)
    storage.refresh()
    if _checksum(storage, orphan, cluster_size) != before:
        raise QedfsError("the disk lacks data that was written to it")


def _checksum(storage: Storage, orphan: OrphanJournal | None, cluster_size: int) -> int:
    """The checksum of the clusters that the journal refers to.

    Takes 60 ms for 64 MiB, which is about as much data as waits for a commit.

    The journal has not been validated yet and may be forged. So offsets outside the file are ignored, and no more
    clusters are read than the file has.
    """
    if orphan is None:
        return 0
    view = memoryview(bytearray(cluster_size))
    size = storage.size()
    places = (place_of(entry) for _, entry in orphan.pairs if not run_count(entry))
    inside = (offset for offset in places if offset < size)
    value = 0
    for offset in itertools.islice(inside, -(-size // cluster_size)):
        storage.read(offset, view)
        value = zlib.crc32(view, value)
    return value
