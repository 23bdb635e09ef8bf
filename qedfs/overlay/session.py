"""One writable opening of an overlay: its header, and the record in its header clusters.

Owns the header and the record as they stand in the file, and the order of their writes.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable

from qedfs.errors import BadOverlay
from qedfs.format.header import BACKING_FILE, HEADER_BYTES, UNTOUCHED, Header, decode_backing_name, decode_header
from qedfs.format.record import SLOT_BYTES, Record, decode_record, encode_record, slot_index, slot_offsets
from qedfs.overlay.storage import Storage
from qedfs.overlay.times import times_at_open


def read_bytes(storage: Storage, offset: int, size: int) -> bytes:
    """Bytes of the overlay, zeros past its end."""
    data = bytearray(size)
    storage.read(offset, memoryview(data))
    return bytes(data)


def read_header(storage: Storage) -> tuple[Header, str | None]:
    """The header and the backing name (None: no backing).

    Raises:
        BadOverlay: it is none that can be served.
    """
    size = storage.size()
    header = decode_header(read_bytes(storage, 0, min(size, HEADER_BYTES)), size)
    if not header.has_backing:
        return header, None
    return header, decode_backing_name(read_bytes(storage, header.backing_name_offset, header.backing_name_size))


def read_record(storage: Storage, header: Header) -> Record | None:
    """The record, or None if there is none that can be trusted."""
    offsets = slot_offsets(header)
    if offsets is None:
        return None
    first, second = (read_bytes(storage, offset, SLOT_BYTES) for offset in offsets)
    return decode_record((first, second))


class Session:
    """The header, backing name and record of an overlay that is open for writing, and their changes.

    The methods are synchronous and wait for the disk: call them through `Storage.in_thread`.
    """

    def __init__(
        self, storage: Storage, header: Header, record: Record | None, *, barrier: Callable[[], None] | None = None
    ) -> None:
        """`barrier`: of the open overlay (`barrier.py`); None: nothing is written but NEED_CHECK."""
        self.header = header
        self._storage = storage
        self._barrier = barrier or storage.barrier
        self._slots = slot_offsets(header)
        self.record = record or Record()
        # Whether the slot that was written last has no barrier behind it, as far as we know: an earlier session may
        # have ended, or been killed, before there was one.
        self._unordered = self.record.sequence > 0
        self.times = times_at_open(
            self.record,
            trusted=bool(header.autoclear_features & UNTOUCHED),
            file_ns=storage.modified_ns(),
            writable=storage.writable,
        )
        self.record = dataclasses.replace(self.record, times=self._pair(), written=False)

    @property
    def has_room(self) -> bool:
        """Whether this overlay can carry a record at all (4 KiB clusters made elsewhere may have no room)."""
        return self._slots is not None

    @property
    def untouched(self) -> bool:
        """Whether no other program has written to the overlay since the record was stored."""
        return bool(self.header.autoclear_features & UNTOUCHED)

    @property
    def ended_in_order(self) -> bool:
        """Whether the session before this one was ours and has ended with `end`, and nobody has written since."""
        return self.untouched and self.record.sequence > 0 and not self.record.session

    def is_seen(self) -> bool:
        """Whether the file is seen to hold our header and our session, without waiting for the disk.

        That of nobody: it has to be looked at more closely. Not while a record or a header is being written.
        """
        header, slot = bytearray(HEADER_BYTES), bytearray(SLOT_BYTES)
        if not self._storage.read_now(0, memoryview(header)) or header != self.header.encode():
            return False
        if self._slots is None or not self.record.session:
            return True
        place = self._slots[slot_index(self.record)]
        return self._storage.read_now(place, memoryview(slot)) and self.record.session.encode() in slot

    def inspect(self) -> None:
        """Raise BadOverlay if the file holds another overlay than the one that was opened. As for `is_seen`.

        Somebody may have copied one over it: it is the same file then, and what our tables lead to is foreign.
        """
        if not self._is_ours():
            raise BadOverlay("was overwritten while it was open, with another overlay or an older copy")

    def _is_ours(self) -> bool:
        try:
            header, _ = read_header(self._storage)
            record = read_record(self._storage, header) or Record()
        except BadOverlay:
            return False
        return header == self.header and record.session == self.record.session

    def fresh(self) -> str:
        """What a new session is called; "" if the overlay has no room for a record."""
        return secrets.token_hex(16) if self.has_room else ""

    def begin(self, session: str, journal: str = "") -> None:
        """Put a new session into the overlay; `journal`: the note of its journal (`journal_search.py`), which is there.

        The record goes first and the bit that vouches for it second, with a barrier between: a bit that became
        durable alone would vouch for the session before.
        """
        if session:
            self.store(dataclasses.replace(self.record, session=session, journal=journal))
        # The bits of others say what our writes make untrue: QEMU clears all that it does not know, and so do we.
        found, ours = self.header.autoclear_features, UNTOUCHED if session else 0
        if found != ours:
            self._write_header(dataclasses.replace(self.header, autoclear_features=ours))
        if found & ~UNTOUCHED:
            self._barrier()

    def end(self) -> None:
        """Note that the session has ended in order: the disk has all that the page cache has, and there is no journal.

        It also tells what the image's times have come to. To be called after the last barrier, whose success it tells
        of: a note that was there before would vouch for pages that the disk may not have taken. It needs no barrier of
        its own. If it is lost, the next session asks the disk, as after a crash, so is the journal that it says is not
        needed, and the image gets a later time.
        """
        if self.record.session:
            self._unordered = False  # the last barrier was behind all records
            ended = dataclasses.replace(self.record, session="", journal="", times=self._pair(), written=False)
            self.record = self._write_slot(ended)
            self._unordered = True

    def store(self, record: Record) -> None:
        """Write a record into the slot that does not hold the present one, and wait until it is durable."""
        record = self._write_slot(record)
        if self._slots is not None:
            self._barrier()
        self._unordered = False
        self.record = record

    def let_times_move(self) -> None:
        """Note that a guest is about to write.

        There is no barrier: the note is in the page cache before the guest's bytes are, so a kill leaves both, and the
        guest's own flush covers both.
        """
        self.record = self._write_slot(dataclasses.replace(self.record, written=True))
        self._unordered = self.times.may_move = True

    def _write_slot(self, record: Record) -> Record:
        """Write a record into the slot that does not hold the present one, which the disk has by then.

        Otherwise one power cut could tear both, and lose the pin.
        """
        record = dataclasses.replace(record, sequence=self.record.sequence + 1)
        if self._slots is not None:
            if self._unordered:
                self._barrier()
            self._storage.write(self._slots[slot_index(record)], [encode_record(record)])
        return record

    def _pair(self) -> tuple[int, int]:
        return self.times.modified_ns, self.times.changed_ns

    def clear_dirty(self, need_check: int) -> None:
        """Clear NEED_CHECK after a repair, which has to be durable before. If the bit comes back it repairs nothing.

        The overlay is not open yet: a barrier that fails here is an error of the open, and no failure of a session.
        """
        self._storage.barrier()
        self._write_header(dataclasses.replace(self.header, features=self.header.features & ~need_check))

    def detach(self) -> None:
        """Drop the backing from the header. The caller has flushed: see `Overlay.detach`."""
        if not self.header.features & BACKING_FILE:
            return
        name_offset, name_size = self.header.backing_name_offset, self.header.backing_name_size
        self._write_header(self.header.without_backing())
        self._barrier()
        # The name may hold a password, which nobody needs who is handed a complete overlay. It is overwritten after the
        # barrier: a power cut that kept the zeros and lost the header would leave an overlay without its backing. The
        # record's barrier makes the zeros durable.
        self._storage.write(name_offset, [bytes(name_size)])
        self.store(dataclasses.replace(self.record, pin=None, paused=False))

    def _write_header(self, header: Header) -> None:
        self._storage.write(0, [header.encode()])
        self.header = header
