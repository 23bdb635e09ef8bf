"""The private record that qedfs keeps in the header clusters, where QEMU never looks.

Owns the two slots, their checksum, and what the record says: which session has the overlay open, which version of the
source its clusters come from (the pin), the times of the image, and the user's wishes that outlive a mount. A record
that is missing, torn or from elsewhere is never an error; it is no record.

There are two slots, written in turn, so that a record torn by a power cut leaves the one before: losing the pin would
let the overlay be filled from two versions of a source. The slots end where the header clusters end. QEMU keeps those
bytes, except that a new backing name is written from offset 64 on; a name that reaches into a slot destroys it, which
the checksum shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from qedfs.format.header import HEADER_BYTES, Header

SLOT_BYTES = 1536  # three sectors; two of them fit behind a maximal name in two 4 KiB clusters
_SESSION = re.compile(r"([0-9a-f]{32})?")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_JOURNAL = re.compile(r"[0-9a-z.]{0,40}")
_PLACE = re.compile(r"[0-9a-f]{16}")
_PUBLISHED = re.compile(r"[a-z0-9-]{1,12}:[0-9a-f]{1,64}")
_SAMPLES = re.compile(r"[0-9a-f]{1,13}:[0-9a-f]{12}(?:,[0-9a-f]{1,13}:[0-9a-f]{12})*")  # see source/samples.py
_PREFIX = struct.Struct("<8sIIQ")  # magic, length of the text, CRC-32 of sequence number and text, sequence number
_MAGIC = b"qedfs\0\1\n"
_MAX_TEXT = SLOT_BYTES - _PREFIX.size
_MAX_SEQUENCE = 1 << 62  # leaves room for those that follow
MAX_TIME = 1 << 62  # nanoseconds, of either sign: the years 1823 to 2116
_MAX_VALIDATOR = 512  # bytes of its JSON; two of them and the rest of a record fit in a slot
_MAX_CALLED = 64  # bytes of its JSON


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """The stored identity of the source.

    `backing` is `digest` of the name it was reached by: another name voids the pin. Validators are stored `shortened`.
    `published` is a digest of the whole file that the server tells, `place` stands for the server, `samples` are blocks
    of the version, `called` is what the user calls it; all empty when there is none.
    """

    backing: str
    size: int
    etag: str | None = None
    last_modified: str | None = None
    published: str = ""
    place: str = ""
    samples: str = ""
    called: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What qedfs remembers inside the overlay. `session` is hex, empty outside a mount.

    `journal`: whose journal on this machine has what the session has not yet brought into the overlay; see
    overlay/journal_search.py.
    `times`: mtime and ctime of the image in nanoseconds since 1970. `written`: a guest may have moved them since.
    """

    session: str = ""
    pin: Pin | None = None
    copy_on_read: bool = True
    paused: bool = False
    sequence: int = 0
    journal: str = ""
    times: tuple[int, int] | None = None
    written: bool = False


def digest(text: str) -> str:
    """32 hex digits that stand for a text of any length."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def shortened(validator: str | None) -> str | None:
    """The validator, or its digest where it is too long for a slot: a server may send kilobytes of ETag."""
    return validator if validator is None or _fits(validator) else _weakness(validator) + "sha256:" + digest(validator)


def _weakness(validator: str) -> str:
    return "W/" if validator.startswith("W/") else ""


def shortened_name(called: str) -> str:
    """What a user calls a version, or its digest where it is too long for a slot."""
    return called if _fits(called, _MAX_CALLED) else "sha256:" + digest(called)


def _fits(text: str, most: int = _MAX_VALIDATOR) -> bool:
    return len(json.dumps(text)) <= most


def slot_offsets(header: Header) -> tuple[int, int] | None:
    """Where the two slots are, or None if the header clusters have no room for them beside the backing name."""
    first = header.area_bytes - 2 * SLOT_BYTES
    name_end = header.backing_name_offset + header.backing_name_size if header.has_backing else HEADER_BYTES
    return (first, first + SLOT_BYTES) if first >= name_end else None


def slot_index(record: Record) -> int:
    """Which of the two slots holds this record."""
    return record.sequence % 2


def encode_record(record: Record) -> bytes:
    """One slot's bytes."""
    text = next((text for text in _texts(record) if len(text) <= _MAX_TEXT), None)
    if text is None:
        raise ValueError(f"record of {len(_text(record))} bytes does not fit in {_MAX_TEXT}")
    body = struct.pack("<Q", record.sequence) + text
    return (_PREFIX.pack(_MAGIC, len(text), zlib.crc32(body), record.sequence) + text).ljust(SLOT_BYTES, b"\0")


def decode_record(slots: tuple[bytes, bytes]) -> Record | None:
    """The newer of the records in the two slots that are whole, or None."""
    found = [record for slot in slots if (record := _decode_slot(slot)) is not None]
    return max(found, key=lambda record: record.sequence, default=None)


def _decode_slot(slot: bytes) -> Record | None:
    if len(slot) < SLOT_BYTES:
        return None
    magic, length, checksum, sequence = _PREFIX.unpack_from(slot)
    if magic != _MAGIC or length > _MAX_TEXT or sequence > _MAX_SEQUENCE:
        return None
    text = slot[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(struct.pack("<Q", sequence) + text) != checksum:
        return None
    try:
        return _from_json(json.loads(text), sequence)
    except (ValueError, RecursionError):
        # The checksum holds, so this is a later version's record, or one that was made to deceive: not ours to read.
        return None


def _texts(record: Record) -> Iterator[bytes]:
    """The record, then what can be left out of it beside long validators, the most dispensable first."""
    timeless = dataclasses.replace(record, times=None)  # the image has the times of its file then
    yield _text(record)
    yield _text(timeless)
    if record.pin is not None and record.pin.samples:
        # They are of use only where the validators leave a doubt, and these are long ones.
        pin = dataclasses.replace(record.pin, samples="")
        yield _text(dataclasses.replace(record, pin=pin))
        yield _text(dataclasses.replace(timeless, pin=pin))


def _text(record: Record) -> bytes:
    return json.dumps(_to_json(record), separators=(",", ":"), sort_keys=True).encode()


def _to_json(record: Record) -> dict[str, object]:
    fields = dataclasses.asdict(record)
    del fields["sequence"]
    for name in ("journal", "times", "written"):  # versions before they came read records without them
        if not fields[name]:
            del fields[name]
    if record.pin is not None:
        pin = dataclasses.asdict(record.pin)
        fields["pin"] = {name: value for name, value in pin.items() if value or name not in _LATER_PIN_FIELDS}
    return fields


def _from_json(fields: object, sequence: int) -> Record:
    match fields:
        case {"session": str(session), "pin": pin, "copy_on_read": bool(copy_on_read), "paused": bool(paused), **rest}:
            journal = rest.pop("journal", "")
            times, written = _times_from_json(rest.pop("times", None)), rest.pop("written", False)
            if rest or not isinstance(written, bool):
                raise ValueError("not a record of this version")
            if _SESSION.fullmatch(session) and isinstance(journal, str) and _JOURNAL.fullmatch(journal):
                return Record(session, _pin_from_json(pin), copy_on_read, paused, sequence, journal, times, written)
    raise ValueError("not a record of this version")


def _times_from_json(times: object) -> tuple[int, int] | None:
    match times:
        case None:
            return None
        case [int(modified), int(changed)] if max(abs(modified), abs(changed)) <= MAX_TIME:
            if bool not in (type(modified), type(changed)):
                return modified, changed
    raise ValueError("not times")


def _pin_from_json(pin: object) -> Pin | None:
    match pin:
        case None:
            return None
        case {"backing": str(backing), "size": int(size), "etag": etag, "last_modified": last_modified, **rest}:
            validators = _validator(etag), _validator(last_modified)
            if _DIGEST.fullmatch(backing) and type(size) is int and 0 <= size < 1 << 64:
                return Pin(backing, size, *validators, **_later(rest))
    raise ValueError("not a pin of this version")


def _later(fields: dict[Any, object]) -> dict[str, str]:
    """The fields of a pin that are left out when they are empty."""
    found: dict[str, str] = {}
    for name, value in fields.items():
        fits = _LATER_PIN_FIELDS.get(name)
        if fits is None or not isinstance(value, str) or not fits(value):
            raise ValueError(f"not a pin's {name}")
        found[name] = value
    return found


_LATER_PIN_FIELDS: dict[str, Callable[[str], object]] = {
    "published": _PUBLISHED.fullmatch,
    "place": _PLACE.fullmatch,
    "samples": _SAMPLES.fullmatch,
    "called": lambda text: _fits(text, _MAX_CALLED),
}


def _validator(value: object) -> str | None:
    if value is None or (isinstance(value, str) and _fits(value)):
        return value
    raise ValueError("not a validator")
