"""The private record: what comes back, and that nothing in a slot can do more than be no record."""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.format.geometry import Geometry
from qedfs.format.header import BACKING_FILE, Header
from qedfs.format.record import (
    SLOT_BYTES,
    Pin,
    Record,
    decode_record,
    digest,
    encode_record,
    shortened,
    slot_index,
    slot_offsets,
)

EMPTY = bytes(SLOT_BYTES)
SESSION = "0123456789abcdef" * 2
PIN = Pin(digest("http://host/base.raw"), 1 << 40, '"etag"', "Tue, 24 Nov 2026 10:00:00 GMT")
FULL = Record(SESSION, PIN, copy_on_read=False, paused=True, sequence=7)


def slot(text: bytes, sequence: int = 1, magic: bytes = b"qedfs\0\1\n") -> bytes:
    """A slot with any text under a right checksum."""
    checksum = zlib.crc32(struct.pack("<Q", sequence) + text)
    return (struct.pack("<8sIIQ", magic, len(text), checksum, sequence) + text).ljust(SLOT_BYTES, b"\0")


def text_of(record: Record) -> dict[str, object]:
    """The JSON object of a record."""
    encoded = encode_record(record)
    length = struct.unpack_from("<I", encoded, 8)[0]
    fields: dict[str, object] = json.loads(encoded[24 : 24 + length])
    return fields


validators = st.none() | st.text(max_size=2000).map(lambda text: shortened(text))
records = st.builds(
    Record,
    st.sampled_from(["", SESSION]),
    st.none() | st.builds(Pin, st.just(digest("x")), st.integers(0, (1 << 64) - 1), validators, validators),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 62),
    times=st.none() | st.tuples(*[st.integers(-(1 << 62), 1 << 62)] * 2),
    written=st.booleans(),
    journal=st.sampled_from(["", "0.1.00000000", "4294967295.ffffffffffffffff.ffffffff"]),
    on_source_error=st.sampled_from(["", "wait", "wait:999999999"]),
    moved=st.sampled_from(["", digest("y")]),
    committing=st.booleans(),
)


@given(records)
def test_what_is_written_is_read(record: Record) -> None:
    """Also with two validators of the greatest length, in any script: a record always fits into its slot."""
    encoded = encode_record(record)
    assert len(encoded) == SLOT_BYTES
    assert decode_record((EMPTY, encoded)) == record
    assert decode_record((encoded, EMPTY)) == record


@pytest.mark.parametrize("character", ["a", '"', "é", "\x01", "\udcff", "😀"])
def test_two_long_validators_fit(character: str) -> None:
    for size in (0, 255, 256, 510, 511, 5000):
        validator = shortened(character * size)
        record = dataclasses.replace(FULL, pin=dataclasses.replace(PIN, etag=validator, last_modified=validator))
        assert decode_record((encode_record(record), EMPTY)) == record, f"{size} characters"


def test_shortened_validators_still_differ() -> None:
    assert shortened("x" * 5000) != shortened("x" * 4999 + "y")
    assert shortened('"short"') == '"short"'
    assert shortened(None) is None


def test_the_newer_slot_wins_whichever_it_is() -> None:
    old, new = (encode_record(dataclasses.replace(FULL, sequence=n, paused=n == 9)) for n in (8, 9))
    for slots in ((old, new), (new, old)):
        found = decode_record(slots)
        assert found is not None
        assert (found.sequence, found.paused) == (9, True)


def test_neighbouring_records_never_share_a_slot() -> None:
    assert [slot_index(dataclasses.replace(FULL, sequence=n)) for n in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("kept", range(0, SLOT_BYTES, 512))
def test_a_torn_record_leaves_the_one_before(kept: int) -> None:
    before = encode_record(dataclasses.replace(FULL, sequence=1))
    long = dataclasses.replace(FULL, sequence=2, pin=dataclasses.replace(PIN, etag="e" * 500, last_modified="m" * 500))
    after = encode_record(long)
    for torn in (after[:kept] + bytes(SLOT_BYTES - kept), bytes(SLOT_BYTES - kept) + after[SLOT_BYTES - kept :]):
        found = decode_record((torn, before))
        assert found is not None
        assert found.sequence == 1


def test_every_flipped_bit_is_noticed() -> None:
    encoded = bytearray(encode_record(FULL))
    for bit in range(8 * (24 + 60)):
        encoded[bit // 8] ^= 1 << bit % 8
        assert decode_record((bytes(encoded), EMPTY)) is None, f"bit {bit}"
        encoded[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"5", b'"text"', b"[]", b"{}", b"null", b"NaN", b"\xff\xfe", b"{" * 1500, b"[" * 1500),
        *(b'{"session":' + b"[" * 1400, b'{"a":' * 300),
    ],
)
def test_a_valid_checksum_over_nonsense_is_no_record(text: bytes) -> None:
    assert decode_record((slot(text[:1512]), EMPTY)) is None


def each(key: str, *values: object) -> list[dict[str, object]]:
    return [{key: value} for value in values]


@pytest.mark.parametrize(
    "changes",
    [
        *each("session", None, 5, "x", "\ud800" * 32, "0" * 31, SESSION + "0"),
        *each("copy_on_read", None, 1, "yes", []),
        *each("paused", None, 0, {}),
        *each("pin", 0, [], {}, "pin"),
        *each("times", 0, [], [1], [1, 2, 3], [1.5, 2], ["1", "2"], [True, False], [0, 1 << 63], {}),
        *each("written", None, 0, 1, "yes"),
        *each("journal", None, 0, "A", "x" * 41, "a b", []),
        {"later": 1},
    ],
)
def test_a_field_of_another_kind_is_no_record(changes: dict[str, object]) -> None:
    text = json.dumps(text_of(FULL) | changes).encode()
    assert decode_record((slot(text), EMPTY)) is None


@pytest.mark.parametrize(
    "changes",
    [
        *each("size", -1, 1 << 64, 1.5, True, None, "1"),
        *each("etag", 1, [], "x" * 511),
        *each("last_modified", False, {}, "é" * 100),
        *each("backing", None, "", "z" * 32),
        {"later": 1},
    ],
)
def test_a_pin_of_another_kind_is_no_record(changes: dict[str, object]) -> None:
    fields = text_of(FULL)
    fields["pin"] = dataclasses.asdict(PIN) | changes
    assert decode_record((slot(json.dumps(fields).encode()), EMPTY)) is None


def test_a_missing_field_is_no_record() -> None:
    for key in text_of(FULL):
        fields = text_of(FULL)
        del fields[key]
        assert decode_record((slot(json.dumps(fields).encode()), EMPTY)) is None


def test_a_sequence_without_successors_is_no_record() -> None:
    text = json.dumps(text_of(FULL)).encode()
    assert decode_record((slot(text, (1 << 64) - 1), EMPTY)) is None


def test_another_magic_or_a_short_slot_is_no_record() -> None:
    text = json.dumps(text_of(FULL)).encode()
    assert decode_record((slot(text), EMPTY)) is not None
    assert decode_record((slot(text, magic=b"qedfs\0\2\n"), EMPTY)) is None
    assert decode_record((slot(text)[:-1], b"")) is None


@given(st.binary(max_size=SLOT_BYTES), st.binary(max_size=SLOT_BYTES))
def test_any_bytes_are_a_record_or_none(first: bytes, second: bytes) -> None:
    assert decode_record((first.ljust(SLOT_BYTES, b"\0"), slot(second[:1512]))) is None


@pytest.mark.parametrize(
    ("cluster_size", "header_size", "name", "expected"),
    [
        (4096, 1, 0, (1024, 2560)),
        (4096, 1, 960, (1024, 2560)),
        (4096, 1, 961, None),
        (4096, 2, 4095, (5120, 6656)),
        (65536, 1, 4095, (62464, 64000)),
    ],
)
def test_the_slots_lie_behind_the_name_or_not_at_all(
    cluster_size: int, header_size: int, name: int, expected: tuple[int, int] | None
) -> None:
    features = BACKING_FILE if name else 0
    area = cluster_size * header_size
    header = Header(Geometry(cluster_size, 1, 512), header_size, features, 0, 0, area, 64, name)
    assert slot_offsets(header) == expected
