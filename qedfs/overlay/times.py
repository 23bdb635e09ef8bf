"""The mtime and ctime of the image, which change when a guest writes and not when the overlay file changes.

Each adopted cluster and each table changes the times of the overlay file. If the image showed these times, backup
programs would consider a disk changed because they have read it. And the kernel would drop its cache of the image,
which it does whenever the mtime changes (fs/fuse/inode.c, auto_inval_data).

Owns the times of an open overlay, and their initial values. They are stored in the private record:

- A session starts with a record that has the times. Before the first write of a guest, the record is changed to say
  that they are changing (`written`). After the last flush it gets their final values. Neither costs a barrier.
- If a guest has written, a killed session, or a power cut, leaves `written` set. The time of the last write is unknown,
  so both times become the time of the next opening, or in a read-only session those of the file. A backup program then
  sees a change, which is right.
- Without a record, or after another program has written to the overlay, the times start as those of the file.

Must not know who writes, nor how the record is stored.
"""

from __future__ import annotations

import time

from qedfs.format.record import MAX_TIME, Record


class Times:
    """The times of one open image, in nanoseconds since 1970 (st_mtime_ns, st_ctime_ns)."""

    def __init__(self, modified_ns: int, changed_ns: int) -> None:
        self.modified_ns = _storable(modified_ns)
        self.changed_ns = _storable(changed_ns)
        self.may_move = False  # whether the record says `written`, so that a write may change them

    def move(self) -> None:
        """Set both times to now, because a guest has written. Takes 0.1 us."""
        self.modified_ns = self.changed_ns = time.time_ns()

    def set(self, modified_ns: int) -> None:
        """Set the mtime as a user asked for. The ctime becomes now."""
        self.modified_ns, self.changed_ns = _storable(modified_ns), time.time_ns()


def times_at_open(record: Record, *, trusted: bool, file_ns: int, writable: bool) -> Times:
    """The times at the start of a session.

    `trusted`: no other program has written to the overlay since the record was stored. `file_ns`: the mtime of
    its file. `writable`: the result will be stored. Otherwise it has to be the same at each opening.
    """
    if trusted and record.written and writable:
        now = time.time_ns()
        return Times(now, now)
    if trusted and record.times is not None and not record.written:
        return Times(*record.times)
    return Times(file_ns, file_ns)


def _storable(time_ns: int) -> int:
    """The nearest time that a record can store. A time out of range would make the whole record invalid."""
    return max(-MAX_TIME, min(time_ns, MAX_TIME))
