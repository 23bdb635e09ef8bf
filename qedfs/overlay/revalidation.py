"""Whether the page cache can be believed about an overlay that is opened, or only the disk.

Owns that decision. After a write-back that failed, the page cache shows tables and data that the disk lacks, and
nothing tells it from the rest (`pagecache.py`). A session that ends in order says so in its record, after its last
barrier; a failed barrier, a kill (before or after the kernel has noticed an error), and any other program that has
written leave no such word. Then all is read from the disk. So distrust needs no note of its own, which a failing disk
might not take.

The journal of a killed session names places whose data was in the page cache only. The kernel tells of data that it
could not write once, to whoever asks first, and that may have been another program. So that data is compared as well:
as the page cache shows it, and as the disk has it. What this does not tell: data that was lost, told to somebody else,
and dropped from the page cache before the overlay was opened.

Must not know what is read afterwards.
"""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

from qedfs.errors import InUse, QedfsError
from qedfs.overlay.journal import OrphanJournal
from qedfs.overlay.journal_search import find
from qedfs.overlay.session import Session, read_header, read_record
from qedfs.overlay.storage import Storage


def revalidate(storage: Storage, journal_folder: Path | None) -> None:
    """Return when reads show what the disk has. Waits for the disk; the caller has the locks of the overlay.

    Raises:
        BadOverlay: it is none that can be served.
        InUse: another program keeps pages of it.
        QedfsError: the disk has not taken what was written before the kill. The journal is removed: it names places
            whose data may be lost, and their clusters would read as garbage.
    """
    header, _ = read_header(storage)
    session = Session(storage, header, read_record(storage, header))
    if session.ended_in_order:
        return
    found = find(storage, journal_folder, session.record.session, session.record.journal)
    if found.unread and session.untouched:
        return  # no session begins before it was read, and until then the page cache may be all that has its data
    orphan = found.orphan if session.untouched else None
    try:
        _refresh(storage, orphan, header.geometry.cluster_size)
    except InUse:
        raise
    except QedfsError as exc:
        if orphan:
            orphan.remove()
        raise QedfsError(
            f"{exc}: writes that were answered before a crash, and not flushed, are lost; open it again to go on with "
            "what the disk has"
        ) from exc


def _refresh(storage: Storage, orphan: OrphanJournal | None, cluster_size: int) -> None:
    """Have reads show what the disk has. QedfsError: the clusters that were left are not, or may not be, there."""
    before = _checksum(storage, orphan, cluster_size)
    storage.refresh()
    if _checksum(storage, orphan, cluster_size) != before:
        raise QedfsError("the disk lacks data that was written to it")


def _checksum(storage: Storage, orphan: OrphanJournal | None, cluster_size: int) -> int:
    """Of the clusters that were left: 64 MiB, about as much as waits for a commit, take 60 ms.

    What this journal names may be anybody's invention, until it is seen to fit: it is looked at inside the file only,
    and not more often than the file has clusters.
    """
    if orphan is None:
        return 0
    view = memoryview(bytearray(cluster_size))
    size = storage.size()
    inside = (offset for _, offset in orphan.pairs if offset < size)
    value = 0
    for offset in itertools.islice(inside, -(-size // cluster_size)):
        storage.read(offset, view)
        value = zlib.crc32(view, value)
    return value
