"""The header and the private record of an open overlay, as they are in the file.

Owns them, and the order in which changes to them are written. Must not know when a change is due, nor what the table
entries say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable

from qedfs.errors import BadOverlay, NoSpace, QedfsError, ReadOnlyOverlay
from qedfs.format.header import (
    BACKING_FILE,
    HEADER_BYTES,
    MAX_BACKING_NAME,
    UNTOUCHED,
    Header,
    decode_backing_name,
    decode_header,
)
from qedfs.format.record import (
    SLOT_BYTES,
    Pin,
    Record,
    Standby,
    decode_record,
    digest,
    encode_record,
    slot_index,
    slot_offsets,
)
from qedfs.overlay.storage import Storage
from qedfs.overlay.times import times_at_open


def read_bytes(storage: Storage, offset: int, size: int) -> bytes:
    """Read bytes of the overlay file. Past its end there are zeros."""
    data = bytearray(size)
    storage.read(offset, memoryview(data))
    return bytes(data)


_ZEROS_AT_ONCE = 1 << 20


def read_header(storage: Storage) -> tuple[Header, str | None]:
    """Read the header and the backing name (None if there is no backing).

    Raises:
        BadOverlay: the overlay cannot be served.
    """
    header = _decode(storage)
    if not header.has_backing:
        return header, None
    name = read_bytes(storage, header.backing_name_offset, header.backing_name_size)
    # Commands read without a lock, so a mount may have detached since we read the header (`Session.detach`).
    if b"\0" in name and not (header := _decode(storage)).has_backing:
        return header, None
    return header, decode_backing_name(name)


def _decode(storage: Storage) -> Header:
    size = storage.size()
    return decode_header(read_bytes(storage, 0, min(size, HEADER_BYTES)), size)


def read_record(storage: Storage, header: Header) -> Record | None:
    """Read the record; None if there is no valid one."""
    offsets = slot_offsets(header)
    if offsets is None:
        return None
    first, second = (read_bytes(storage, offset, SLOT_BYTES) for offset in offsets)
    return decode_record((first, second))


# A second place for a backing name, in a sector of its own, after the longest name at the first place.
SECOND_NAME_OFFSET = 2048


def _settled(record: Record, storage: Storage, header: Header) -> Record:
    """The record after a kill or a power cut in `Session.move_backing`: its pin is that of the name in the header."""
    if not record.moved:
        return record
    pin = record.pin
    if pin is not None and header.has_backing:
        name = read_bytes(storage, header.backing_name_offset, header.backing_name_size)
        if digest(name.decode(errors="surrogateescape")) == record.moved:
            pin = dataclasses.replace(pin, backing=record.moved)
    return dataclasses.replace(record, pin=pin, moved="")


class Session:
    """The header, backing name and record of an overlay that is open for writing, and their changes.

    The methods are synchronous and wait for the disk: call them through `Storage.in_thread`.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        record: Record | None,
        *,
        barrier: Callable[[], None] | None = None,
        prefix: str = "",
    ) -> None:
        """`barrier`: that of the open overlay (`barrier.py`); None if nothing but NEED_CHECK is going to be written.

        `prefix`: of the ids of sessions, in hexadecimal, by which they show the mount that they belong to.
        """
        self.header = header
        self._storage = storage
        self._barrier = barrier or storage.barrier
        self._prefix = prefix
        self._slots = slot_offsets(header)
        self.record = _settled(record or Record(), storage, header)
        # Whether the last write of a slot may not be durable yet. True at first: an earlier session may have ended, or
        # been killed, before the barrier.
        self._unordered = self.record.sequence > 0
        # (offset, size) of the backing's name after the header has dropped it, until it is overwritten.
        self._dropped_name: tuple[int, int] | None = None
        self.times = times_at_open(
            self.record,
            trusted=bool(header.autoclear_features & UNTOUCHED),
            file_ns=storage.modified_ns(),
            writable=storage.writable,
        )
        self.record = dataclasses.replace(self.record, times=self._pair(), written=False)

    @property
    def has_room(self) -> bool:
        """Whether this overlay can hold a record at all. (With 4 KiB clusters, a header by another program may not.)"""
        return self._slots is not None

    @property
    def untouched(self) -> bool:
        """Whether no other program has written to the overlay since the record was stored."""
        return bool(self.header.autoclear_features & UNTOUCHED)

    @property
    def ended_in_order(self) -> bool:
        """Whether the previous session was ours and has ended with `end`, and no other program has written since."""
        return self.untouched and self.record.sequence > 0 and not self.record.session

    def is_seen(self) -> bool:
        """Whether the page cache shows our header and our session in the file. Does not wait for the disk.

        False may also mean that they are not in the page cache; then use `inspect`. Must not be called while a record
        or a header is being written.
        """
        header, slot = bytearray(HEADER_BYTES), bytearray(SLOT_BYTES)
        if not self._storage.read_now(0, memoryview(header)) or header != self.header.encode():
            return False
        if self._slots is None or not self.record.session:
            return True
        place = self._slots[slot_index(self.record)]
        return self._storage.read_now(place, memoryview(slot)) and self.record.session.encode() in slot

    def inspect(self) -> None:
        """Raise BadOverlay if the file contains another overlay than the one that was opened.

        A user may have copied another overlay over it. It is the same file then, but our tables refer to foreign data.
        Must not be called while a record or a header is being written.
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
        """The id of a new session; "" if the overlay has no room for a record."""
        return f"{self._prefix}{os.urandom(16 - len(self._prefix) // 2).hex()}" if self.has_room else ""

    def mark(self) -> str:
        """Tells which session the overlay is in, or which was the last one.

        If another program writes to it, it gets another mark. Only an overlay that has no room for a record always has
        the same.
        """
        if not self.has_room:
            return "-"
        told = f"{'' if self.untouched else '!'}{self.record.session or f'#{self.record.sequence}.'}"
        # Without a session of ours, the only trace of others is the time of the file, which we leave alone.
        return told if self._storage.writable else f"{told}@{self._storage.modified_ns()}"

    def marks(self) -> tuple[str, ...]:
        """The beginnings of the marks that it may have later if nobody else writes to it."""
        if self.has_room and self._storage.writable:
            # Of any session of this mount, and of the end of this one.
            return (self._prefix or self.record.session, f"#{self.record.sequence + 1}.")
        return (self.mark(),)

    def begin(self, session: str, journal: str = "") -> None:
        """Store a new session in the overlay. `journal`: the note of its journal (`journal_search.py`), which exists.

        The record is written first, then, after a barrier, the bit that vouches for it. If only the bit became durable,
        it would vouch for the previous session.
        """
        if session:
            self.store(dataclasses.replace(self.record, session=session, journal=journal))
        # Our writes invalidate what the autoclear bits of other programs say. Like QEMU, clear all unknown ones.
        found, ours = self.header.autoclear_features, UNTOUCHED if session else 0
        if found != ours:
            self._write_header(dataclasses.replace(self.header, autoclear_features=ours))
        if found & ~UNTOUCHED:
            self._barrier()

    def end(self) -> None:
        """Record that the session has ended cleanly: the disk has all of the page cache, and there is no journal.

        The record also gets the final times of the image. Call this after the last barrier has succeeded; an earlier
        note would vouch for pages that may not be on the disk. It needs no barrier of its own: if it is lost, the next
        session evicts the page cache, as after a crash, and looks for the journal in vain, and the image gets a later
        time.
        """
        if self.record.session:
            self._unordered = False  # the last barrier came after all records
            ended = dataclasses.replace(self.record, session="", journal="", times=self._pair(), written=False)
            self.record = self._write_slot(ended)
            self._unordered = True

    def remember(self, record: Record) -> None:
        """Take over a record that cannot be stored yet, because the session has not begun: `begin` stores it."""
        self.record = record

    def store(self, record: Record, *, otherwise: Record | None = None) -> None:
        """Write a record to the slot that does not hold the current one, and make it durable.

        `otherwise`: which record is to count in the next session if the barrier fails. None: either.
        """
        record = self._write_slot(record)
        if self._slots is not None:
            try:
                self._barrier()
            except ReadOnlyOverlay:
                if otherwise is not None:
                    self._overwrite(record, otherwise)
                raise
        self._unordered = False
        self.record = record

    def _overwrite(self, record: Record, otherwise: Record) -> None:
        """After a failed barrier, overwrite the new record with the one that its caller goes on with.

        A failed barrier does not tell whether the disk has the new record. Without this, an overlay whose activation
        has failed could be active in the next session, although its guest went on at the source. It goes to the same
        slot: torn, it leaves the other slot with the current record. The committer then reads everything from the disk
        again, after another barrier. If the disk works by then, a power cut does not leave the new record any more.
        """
        again = dataclasses.replace(otherwise, sequence=record.sequence + 2)
        if self._slots is not None:
            with contextlib.suppress(QedfsError):
                self._storage.write(self._slots[slot_index(again)], [encode_record(again)])

    def let_times_move(self) -> None:
        """Record that a guest is about to write. From then on, what was activated is not revoked any more.

        This needs no barrier. The record is in the page cache before the guest's bytes are, so a kill loses neither,
        and the guest's own flush makes both durable.
        """
        standby = Standby.ACTIVE if self.record.standby is Standby.REVOCABLE else self.record.standby
        self.record = self._write_slot(dataclasses.replace(self.record, written=True, standby=standby))
        self._unordered = self.times.may_move = True

    def _write_slot(self, record: Record) -> Record:
        """Write a record to the slot that does not hold the current one, after making the current one durable.

        Otherwise one power cut could tear both, and the pin would be lost.
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
        """Clear NEED_CHECK after a repair, which is made durable first. It is harmless if a power cut restores the bit.

        The overlay is not open yet, so a barrier that fails here is an error of the opening, not of a session.
        """
        self._storage.barrier()
        self._write_header(dataclasses.replace(self.header, features=self.header.features & ~need_check))

    def detach(self) -> None:
        """Drop the backing from the header. The caller has flushed: see `Overlay.detach`.

        If a step finds no space (some file systems never overwrite in place), the next call continues there.
        """
        if self.header.features & BACKING_FILE:
            name = self.header.backing_name_offset, self.header.backing_name_size
            self._write_header(self.header.without_backing())
            self._dropped_name = name
        if self._dropped_name is None:
            return
        self._barrier()
        # The name may contain a password, and users of a complete overlay do not need it. Overwrite it only after the
        # barrier: if a power cut kept the zeros but lost the header, the overlay would have lost its backing.
        offset, size = self._dropped_name
        self._storage.write(offset, [bytes(size)])
        self.store(
            dataclasses.replace(
                self.record, pin=None, paused=False, standby=Standby.NEVER, on_source_error="", committing=False
            )
        )
        if self._slots is None:
            self._barrier()  # for the zeros, as there is no record whose barrier covers them
        self._dropped_name = None

    def resize(self, image_size: int) -> None:
        """Record another size of the image, durably. The caller says what must be durable before (`resize.py`)."""
        geometry = dataclasses.replace(self.header.geometry, image_size=image_size)
        self._write_header(dataclasses.replace(self.header, geometry=geometry))
        self._barrier()

    def empty(self) -> None:
        """Drop all clusters, and record that the overlay is in standby. The record says EMPTYING already, durably.

        The overlay counts as empty from then on, whatever the file has (`open.py`), so a kill or a power cut here costs
        nothing: the next opening does this again. The session must be begun anew after it.
        """
        self._drop_clusters()
        pin = None if self.record.pin is None else Pin(self.record.pin.backing, self.record.pin.size)
        self.store(dataclasses.replace(self.record, standby=Standby.WAITING, pin=pin, journal=""))

    def drop_committed(self) -> None:
        """Drop all clusters, whose bytes the backing has, too, durably, and end the session.

        Whichever entries a kill or a power cut leaves here, the image reads the same.
        """
        self._drop_clusters()
        self._barrier()  # for the length: a session that has ended in order leaves nothing that nobody refers to
        self.end()

    def _drop_clusters(self) -> None:
        geometry, first = self.header.geometry, self.header.l1_table_offset
        end = first + geometry.table_bytes
        for at in range(first, end, _ZEROS_AT_ONCE):
            self._storage.write(at, [bytes(min(_ZEROS_AT_ONCE, end - at))])
        # Before a record that no longer says that the file has to be emptied, and before the cut: other programs, which
        # do not know the record, must not find entries that point past the end.
        self._barrier()
        self._storage.resize(max(end, self.header.area_bytes))

    def move_backing(self, name: bytes, pin: Pin | None) -> None:
        """Give the overlay another backing name, durably. `pin`: of that backing, with the `digest` of the name.

        The caller has compared the backing. At every moment the file names a backing that was compared, whole, and has
        a pin that counts for it: without the pin, a later session would accept any version. So, with a barrier after
        each step:

        1. The record says that its pin counts for the new name, too.
        2. The new name is written where the old one is not, as the old one still counts.
        3. The header names the new one. It is 64 bytes in one sector, which a power cut does not tear.
        4. The record has the new pin. The old name is overwritten, since it may contain a password.

        Raises:
            QedfsError: the header has no room for the name. Nothing was written.
        """
        old = self.header
        offset = self._place_for(len(name))
        self.store(dataclasses.replace(self.record, moved=digest(name.decode())))
        self._storage.write(offset, [name])
        self._barrier()
        self._write_header(dataclasses.replace(old, backing_name_offset=offset, backing_name_size=len(name)))
        self._barrier()
        self._storage.write(old.backing_name_offset, [bytes(old.backing_name_size)])
        self.store(dataclasses.replace(self.record, pin=pin or self._moved_pin(), moved="", committing=False))
        if self._slots is None:
            self._barrier()  # for the zeros, as there is no record whose barrier covers them

    def _moved_pin(self) -> Pin | None:
        pin = self.record.pin
        return None if pin is None else dataclasses.replace(pin, backing=self.record.moved)

    def _place_for(self, size: int) -> int:
        """Where in the header's clusters a new name has room beside the present one. Raises QedfsError if nowhere."""
        end = self.header.area_bytes if self._slots is None else self._slots[0]
        first, last = self.header.backing_name_offset, self.header.backing_name_offset + self.header.backing_name_size
        for offset in (HEADER_BYTES, SECOND_NAME_OFFSET):
            if offset + size <= end and (offset + size <= first or offset >= last):
                return offset
        raise QedfsError("the header of the overlay has no room for another name of a backing")

    def finish_detach(self) -> None:
        """Overwrite what is left of a backing's name in an overlay that has no backing, as `detach` would have done.

        A kill between the last two steps of `detach` leaves the name behind, and so does QEMU whenever it drops a
        backing. The caller has opened the overlay for writing. If there is no space for it (some file systems never
        overwrite in place), the next opening tries again.
        """
        if self.header.has_backing:
            return
        end = (
            self._slots[0] if self._slots is not None else min(self.header.area_bytes, HEADER_BYTES + MAX_BACKING_NAME)
        )
        size = end - HEADER_BYTES
        zeros = bytes(size)
        if read_bytes(self._storage, HEADER_BYTES, size) == zeros:
            return
        # A header without backing must be on the disk before the zeros: see `detach`.
        self._storage.barrier()
        with contextlib.suppress(NoSpace):
            self._storage.write(HEADER_BYTES, [zeros])
            self._storage.barrier()

    def _write_header(self, header: Header) -> None:
        self._storage.write(0, [header.encode()])
        self.header = header
