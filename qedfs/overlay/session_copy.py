"""The copy of an overlay file that is in a session: ends the session in the copy, which is an overlay of its own.

Owns what the record of such a copy says. Must not know how the copy is made.
"""

from __future__ import annotations

import dataclasses

from qedfs.overlay.session import Session, read_header, read_record
from qedfs.overlay.storage import Storage


def end_session(storage: Storage, *, modified_ns: int, changed_ns: int) -> None:
    """Let the record of a copy say that its session has ended in order, durably. Waits for the disk.

    The file must hold all entries of the session (`stillness.py`). The journal is that of the original: without this,
    the next opening of the copy would look for it, and repeat in the copy what has become of the original since.

    The barrier of the record makes all of the copy durable. Raises the errors of the storage.
    """
    header, _ = read_header(storage)
    session = Session(storage, header, read_record(storage, header))
    times = modified_ns, changed_ns
    session.store(dataclasses.replace(session.record, session="", journal="", times=times, written=False))
    storage.barrier()  # an overlay without room for a record has written none
