"""The private record that qedfs stores in the header clusters, in bytes that QEMU never reads.

Owns the two slots, their checksum and the fields of the record: the session that has the overlay open, the version of
the source that its clusters come from (the pin), the times of the image, whether it is in standby, and the settings
that outlive a mount. A record that is missing, torn or not ours is never an error. It counts as no record.

The two slots are written in turn. If a power cut tears one, the other still holds the previous record. Losing the pin
would allow the overlay to be filled from two versions of a source. The slots are at the end of the header clusters.
QEMU preserves these bytes, except that it writes a new backing name from offset 64 on. A name that reaches into a slot
destroys the record there, which the checksum detects.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from qedfs.format.header import HEADER_BYTES, Header

SLOT_BYTES = 1536  # three sectors; two slots fit after a backing name of maximal length in two 4 KiB clusters
_SESSION = re.compile(r"([0-9a-f]{32})?")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_RULE = re.compile(r"[a-z:0-9]{0,16}")
_JOURNAL = re.compile(r"[0-9a-z.]{0,40}")
_PLACE = re.compile(r"[0-9a-f]{16}")
_PUBLISHED = re.compile(r"[a-z0-9-]{1,12}:[0-9a-f]{1,64}")
_SAMPLES = re.compile(r"[0-9a-f]{1,13}:[0-9a-f]{12}(?:,[0-9a-f]{1,13}:[0-9a-f]{12})*")  # see source/samples.py
_PREFIX = struct.Struct("<8sIIQ")  # magic, length of the JSON text, CRC-32 of sequence number and text, sequence number
_MAGIC = b"qedfs\0\1\n"
_MAX_TEXT = SLOT_BYTES - _PREFIX.size
_MAX_SEQUENCE = 1 << 62  # a record above it is rejected, so that later sequence numbers still fit
MAX_TIME = 1 << 62  # nanoseconds before or after 1970: the years 1823 to 2116
_MAX_VALIDATOR = 512  # bytes as JSON; two validators and the rest of a record fit in a slot
_MAX_CALLED = 64  # bytes as JSON


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """The stored identity of the source.

    `backing` is the `digest` of the backing name: under another name the pin is void. Validators are stored
    `shortened`. `published` is a digest of the whole file as reported by the server, `place` identifies the server,
    `samples` are digests of some blocks, and `called` is the user's own name for the version. Each of these is empty if
    unknown.
    """

    backing: str
    size: int
    etag: str | None = None
    last_modified: str | None = None
    published: str = ""
    place: str = ""
    samples: str = ""
    called: str = ""


class Standby(enum.StrEnum):
    """Where an overlay is on its way from standby, in which nothing of its source is kept, to a disk of its own."""

    NEVER = ""  # it was not made or mounted for standby
    WAITING = "waiting"  # in standby: another program may still change the source
    EMPTYING = "emptying"  # on the way back to standby: its clusters are being dropped
    REVOCABLE = "revocable"  # it was activated, and no guest has written since
    ACTIVE = "active"  # it was activated, and holds what guests have written

    @property
    def waits(self) -> bool:
        """Whether nothing of the source may be kept."""
        return self in (Standby.WAITING, Standby.EMPTYING)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What qedfs stores inside the overlay. `session` is hex, and empty while the overlay is not mounted.

    `journal`: the user, file and boot of the journal that holds what this session has not yet committed to the overlay;
    see overlay/journal_search.py.
    `times`: mtime and ctime of the image in nanoseconds since 1970. `written`: a guest may have written since then, so
    that `times` is out of date. `on_source_error`: see image/source_errors.py.
    `moved`: the `digest` of the backing name that the header is about to get (`Session.move_backing`). The pin counts
    for that name, too.
    `committing`: the backing may have got a part of the overlay's own bytes (image/commit_down.py). Its pin then has
    nothing but the size of before, and samples of what stays as it is.
    """

    session: str = ""
    pin: Pin | None = None
    copy_on_read: bool = True
    paused: bool = False
    sequence: int = 0
    journal: str = ""
    times: tuple[int, int] | None = None
    written: bool = False
    standby: Standby = Standby.NEVER
    on_source_error: str = ""
    moved: str = ""
    committing: bool = False


def digest(text: str) -> str:
    """32 hex digits that identify a text of any length."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def shortened(validator: str | None) -> str | None:
    """The validator, or its digest if it is too long for a slot: a server may send an ETag of kilobytes."""
    return validator if validator is None or _fits(validator) else _weakness(validator) + "sha256:" + digest(validator)


def _weakness(validator: str) -> str:
    return "W/" if validator.startswith("W/") else ""


def shortened_name(called: str) -> str:
    """The user's name for a version, or its digest if it is too long for a slot."""
    return called if _fits(called, _MAX_CALLED) else "sha256:" + digest(called)


def _fits(text: str, most: int = _MAX_VALIDATOR) -> bool:
    return len(json.dumps(text)) <= most


def slot_offsets(header: Header) -> tuple[int, int] | None:
    """The offsets of the two slots, or None if the header clusters have no room for them after the backing name."""
    first = header.area_bytes - 2 * SLOT_BYTES
    name_end = header.backing_name_offset + header.backing_name_size if header.has_backing else HEADER_BYTES
    return (first, first + SLOT_BYTES) if first >= name_end else None


def slot_index(record: Record) -> int:
    """Which of the two slots this record goes into."""
    return record.sequence % 2


def encode_record(record: Record) -> bytes:
    """The bytes of a slot that holds this record. Optional fields are left out if the record would not fit."""
    text = next((text for text in _texts(record) if len(text) <= _MAX_TEXT), None)
    if text is None:
        raise ValueError(f"record of {len(_text(record))} bytes does not fit in {_MAX_TEXT}")
    body = struct.pack("<Q", record.sequence) + text
    return (_PREFIX.pack(_MAGIC, len(text), zlib.crc32(body), record.sequence) + text).ljust(SLOT_BYTES, b"\0")


def decode_record(slots: tuple[bytes, bytes]) -> Record | None:
    """The newest valid record of the two slots, or None."""
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
        # The checksum is right, so a later version of qedfs wrote this record, or somebody forged it. Ignore it.
        return None


def _texts(record: Record) -> Iterator[bytes]:
    """The record as JSON, then shorter and shorter versions of it, in case the validators are long.

    What matters least is left out first.
    """
    timeless = dataclasses.replace(record, times=None)  # without them, the image has the times of its file
    yield _text(record)
    yield _text(timeless)
    if record.pin is not None and record.pin.samples:
        # Samples only help when the validators are inconclusive, and validators this long are not.
        pin = dataclasses.replace(record.pin, samples="")
        yield _text(dataclasses.replace(record, pin=pin))
        yield _text(dataclasses.replace(timeless, pin=pin))


def _text(record: Record) -> bytes:
    return json.dumps(_to_json(record), separators=(",", ":"), sort_keys=True).encode()


def _to_json(record: Record) -> dict[str, object]:
    fields = dataclasses.asdict(record)
    del fields["sequence"]
    # Older versions of qedfs reject a record with a field that they do not know.
    for name in ("journal", "times", "written", "standby", "on_source_error", "moved", "committing"):
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
            standby = Standby(str(rest.pop("standby", "")))  # ValueError for another one, as below
            rule = rest.pop("on_source_error", "")
            moved = rest.pop("moved", "")
            if not isinstance(moved, str) or (moved and not _DIGEST.fullmatch(moved)):
                raise ValueError("not a record of this version")
            committing = rest.pop("committing", False)
            if not isinstance(committing, bool):
                raise ValueError("not a record of this version")
            if rest or not isinstance(written, bool) or not isinstance(rule, str) or not _RULE.fullmatch(rule):
                raise ValueError("not a record of this version")
            if _SESSION.fullmatch(session) and isinstance(journal, str) and _JOURNAL.fullmatch(journal):
                known = _pin_from_json(pin)
                last = (sequence, journal, times, written, standby, rule, moved, committing)
                return Record(session, known, copy_on_read, paused, *last)
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
    """The optional fields of a pin, which are left out of the record when they are empty."""
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
