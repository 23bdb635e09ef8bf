"""The header: every field at its borders, and the same verdict as QEMU's where there is no reason to differ."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import BadOverlay
from qedfs.format.geometry import Geometry, round_down, round_up
from qedfs.format.header import (
    BACKING_FILE,
    HEADER_BYTES,
    NEED_CHECK,
    NO_PROBE,
    Header,
    decode_backing_name,
    decode_header,
    valid_table_offset,
)
from tests.harness.hang import HANG_SECONDS
from tests.harness.require import require

KIB = 1 << 10
GOOD = Header(Geometry(65536, 4, 1 << 30), 1, BACKING_FILE | NO_PROBE, 0, 0, 65536, 64, 8)
LENGTH = 5 * 65536


def changed(**fields: int) -> Header:
    """GOOD with fields of the header or its geometry changed."""
    shape = {name: fields.pop(name) for name in ("cluster_size", "table_size", "image_size") if name in fields}
    return dataclasses.replace(GOOD, geometry=dataclasses.replace(GOOD.geometry, **shape), **fields)


def verdict(header: Header, length: int = LENGTH) -> str | None:
    """What is said against a header, or None."""
    try:
        decode_header(header.encode(), length)
    except BadOverlay as exc:
        return str(exc)
    return None


def test_the_layout_is_that_of_the_specification() -> None:
    header = Header(Geometry(1 << 16, 2, 3 << 9), 4, 5, 6, 7, 8 << 16, 9, 10)
    assert header.encode() == struct.pack("<4sIIIQQQQQII", b"QED\0", 1 << 16, 2, 4, 5, 6, 7, 8 << 16, 3 << 9, 9, 10)
    assert len(header.encode()) == HEADER_BYTES


shapes = st.tuples(st.integers(12, 26), st.sampled_from((1, 2, 4, 8, 16)), st.integers(1, 3), st.integers(0, 1 << 40))


@given(shapes, st.integers(0, 7), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, 9))
def test_a_header_comes_back(
    shape: tuple[int, int, int, int], features: int, compat: int, autoclear: int, gap: int
) -> None:
    shift, table_size, header_size, sectors = shape
    geometry = Geometry(1 << shift, table_size, 0)
    image_size = min(sectors * 512, geometry.max_image_size, (1 << 63) - 512)
    geometry = dataclasses.replace(geometry, image_size=image_size)
    offset = (header_size + gap) << shift
    header = Header(geometry, header_size, features, compat, autoclear, offset, 64, 100)
    assert decode_header(header.encode() + b"junk", offset + geometry.table_bytes) == header
    with pytest.raises(BadOverlay, match="L1 table"):
        decode_header(header.encode(), offset + geometry.table_bytes - 1)


def test_a_short_file_is_none() -> None:
    for size in range(HEADER_BYTES):
        try:
            header: object = decode_header(GOOD.encode()[:size], size)
        except BadOverlay as exc:
            header = str(exc)
        assert "shorter than a header" in str(header), f"{size} bytes"


@pytest.mark.parametrize("byte", range(4))
def test_another_magic_is_none(byte: int) -> None:
    data = bytearray(GOOD.encode())
    data[byte] ^= 1
    with pytest.raises(BadOverlay, match="not a QED image"):
        decode_header(bytes(data), LENGTH)


ACCEPTED = [
    {},
    {"features": 0},
    {"features": BACKING_FILE | NEED_CHECK | NO_PROBE},
    {"compat_features": (1 << 64) - 1},
    {"autoclear_features": (1 << 64) - 1},
    {"image_size": 0},
    {"image_size": 512},
    {"image_size": 1 << 46},
    {"backing_name_size": 0, "backing_name_offset": 0},
    {"backing_name_offset": 65536 - 8},
    {"backing_name_size": 4095},
    {"features": 0, "backing_name_offset": 1 << 31, "backing_name_size": 1 << 31},
]
REFUSED = [
    *({"features": 1 << bit} for bit in (3, 4, 31, 32, 63)),
    *({"cluster_size": size} for size in (0, 1, 2048, 4095, 4097, 65535, 65537, 3 << 15, 1 << 27, (1 << 32) - 1)),
    *({"table_size": size} for size in (0, 3, 5, 15, 17, 32, (1 << 32) - 1)),
    *({"header_size": size} for size in (2, 1 << 16, (1 << 32) - 1)),
    *({"image_size": size} for size in (1, 511, 513, (1 << 46) + 512, 1 << 63, (1 << 64) - 512)),
    *({"l1_table_offset": at} for at in (0, 1, 4096, 65535, 65537, 131072, LENGTH, 1 << 63, (1 << 64) - 65536)),
    *({"backing_name_offset": at} for at in (65536 - 7, 65536, (1 << 32) - 1)),
    *({"backing_name_size": size} for size in (4096, 65536, (1 << 32) - 1)),
]
# Refused by us and opened by QEMU, each with its reason.
OURS = [
    {"header_size": 0, "features": 0},  # offset 0 becomes a legal cluster, and a write to it destroys the header
    {"backing_name_offset": 0},  # the name would be the header itself
    {"backing_name_offset": 63},
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_accepted(fields: dict[str, int]) -> None:
    assert verdict(changed(**fields)) is None


@pytest.mark.parametrize("fields", [*REFUSED, *OURS], ids=str)
def test_refused(fields: dict[str, int]) -> None:
    assert verdict(changed(**fields))


def qemu_opens(header: Header, length: int, folder: Path) -> bool:
    """Whether `qemu-img check` opens the file. The backing exists, also under the name that is read from offset 0."""
    path = folder / "header.qed"
    data = bytearray(header.encode().ljust(KIB, b"\0"))
    data[64:72] = b"base.raw"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(length)
    for name in ("base.raw", "QED"):
        (folder / name).write_bytes(bytes(512))
    done = subprocess.run(
        [require("qemu-img"), "check", "-q", "-f", "qed", str(path)],
        capture_output=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    return done.returncode != 1


def test_qemu_gives_the_same_verdict(tmp_path: Path) -> None:
    cases = [(fields, True) for fields in ACCEPTED] + [(fields, False) for fields in REFUSED]
    differ = [fields for fields, opens in cases if qemu_opens(changed(**fields), LENGTH, tmp_path) is not opens]
    assert differ == []
    assert [fields for fields in OURS if not qemu_opens(changed(**fields), LENGTH, tmp_path)] == []


@pytest.mark.parametrize(("cluster_size", "table_size"), [(65536, 1), (1 << 26, 2), (1 << 23, 2), (1 << 22, 4)])
def test_we_open_what_the_specification_allows_and_qemu_cannot(
    tmp_path: Path, cluster_size: int, table_size: int
) -> None:
    """Table size 1 fails QEMU's test for overflow; with large clusters its largest image size wraps to 0."""
    header = changed(cluster_size=cluster_size, table_size=table_size, l1_table_offset=cluster_size)
    length = cluster_size * (1 + table_size)
    assert verdict(header, length) is None
    assert not qemu_opens(header, length, tmp_path)


def test_a_detached_header_has_no_trace_of_the_backing() -> None:
    alone = dataclasses.replace(GOOD, features=7, compat_features=9).without_backing()
    assert (alone.features, alone.compat_features) == (NEED_CHECK, 9)
    assert (alone.backing_name_offset, alone.backing_name_size, alone.has_backing) == (64, 0, False)
    assert verdict(alone) is None


@pytest.mark.parametrize("name", ["base.raw", "http://host/ä?x=1", "日本"])
def test_a_backing_name_is_text(name: str) -> None:
    assert decode_backing_name(name.encode()) == name


@pytest.mark.parametrize("data", [b"a\0b", b"\xff", b"\xed\xa0\x80", b"ab\0"])
def test_a_backing_name_without_meaning_is_refused(data: bytes) -> None:
    with pytest.raises(BadOverlay, match="backing name"):
        decode_backing_name(data)


# Geometry.


@given(shapes)
def test_the_numbers_of_a_geometry_agree(shape: tuple[int, int, int, int]) -> None:
    shift, table_size, _, sectors = shape
    geometry = Geometry(1 << shift, table_size, sectors * 512)
    assert geometry.entries * 8 == geometry.table_bytes
    assert (geometry.clusters - 1) * geometry.cluster_size < geometry.image_size or geometry.clusters == 0
    assert geometry.clusters * geometry.cluster_size >= geometry.image_size
    assert (geometry.l1_used - 1) * geometry.l2_span < geometry.image_size or geometry.l1_used == 0
    assert geometry.l1_used * geometry.l2_span >= geometry.image_size
    assert (geometry.fault() is None) == (geometry.image_size <= geometry.max_image_size)


def test_the_default_geometry_reaches_64_tib() -> None:
    assert Geometry(65536, 4, 0).max_image_size == 64 << 40
    assert Geometry(65536, 4, 64 << 40).fault() is None


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 26))
def test_rounding(value: int, multiple: int) -> None:
    down, up = round_down(value, multiple), round_up(value, multiple)
    assert down % multiple == 0 == up % multiple
    assert down <= value <= up
    assert up - down in (0, multiple)


@pytest.mark.parametrize(
    ("offset", "valid"),
    [(65536, True), (131072, True), (0, False), (65536 + 512, False), (131072 + 65536, False), (-65536, False)],
)
def test_a_table_lies_wholly_inside_the_file(offset: int, valid: bool) -> None:
    assert valid_table_offset(offset, GOOD, 6 * 65536 + 100) is valid
