"""The image's own times: they move when a guest writes, and not when the overlay file does.

Each cluster that is adopted, and each table, moves the times of the overlay file. As times of the image these would
tell backup programs that a disk has changed because they read it, and the kernel to drop what it has cached of the
image (it does so whenever the mtime moves: fs/fuse/inode.c, auto_inval_data).

Owns what they are in an open overlay, and how they begin. They last in the private record:

- A session begins with a record that has them. Before the first write of a guest the record says that they move
  (`written`), and after the last flush what they have come to. Neither costs a barrier.
- A session that was killed, or lost its power, leaves `written` if a guest had written: when it last did is not known,
  so they become the time of the opening. Whoever compares then sees a change, which there is.
- Without a record, or after another program has written to the overlay, they begin as the times of the file.

Must not know who writes, nor how the record is stored.
"""

from __future__ import annotations

import time

from qedfs.format.record import MAX_TIME, Record


class Times:
    """Of one open image, in nanoseconds since 1970 (st_mtime_ns, st_ctime_ns)."""

    def __init__(self, modified_ns: int, changed_ns: int) -> None:
        self.modified_ns = _storable(modified_ns)
        self.changed_ns = _storable(changed_ns)
        self.may_move = False  # whether a write may move them: the record says so

    def move(self) -> None:
        """A guest has written. 0.1 us."""
        self.modified_ns = self.changed_ns = time.time_ns()

    def set(self, modified_ns: int) -> None:
        """Somebody wants the image to have this mtime."""
        self.modified_ns, self.changed_ns = _storable(modified_ns), time.time_ns()


def times_at_open(record: Record, *, trusted: bool, file_ns: int, writable: bool) -> Times:
    """The times with which a session begins.

    `trusted`: nobody else has written to the overlay since the record; `file_ns`: the mtime of its file; `writable`:
    what is found here comes to last. Otherwise it has to be the same at each opening.
    """
    if trusted and record.written and writable:
        now = time.time_ns()
        return Times(now, now)
    if trusted and record.times is not None and not record.written:
        return Times(*record.times)
    return Times(file_ns, file_ns)


def _storable(time_ns: int) -> int:
    """The nearest time that a record can hold: one that it cannot would cost the whole record."""
    return max(-MAX_TIME, min(time_ns, MAX_TIME))
