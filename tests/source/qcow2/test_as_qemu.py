"""Odd images that QEMU reads are read, to the same bytes; those that it does not read are errors here, too."""

from __future__ import annotations

import logging
import struct
import subprocess
from pathlib import Path

import pytest

from qedfs.errors import SourceError
from tests.harness.require import require
from tests.source.qcow2.build import COPIED, image
from tests.source.qcow2.support import opened, read

DATA = b"d" * 512
RESERVED_L1 = (1, 1 << 8, 1 << 56, 1 << 61, 1 << 62)
RESERVED_L2 = (2, 1 << 8, 1 << 56, 1 << 61)
SIZE = 4 * 512


def with_entries(l1: int, *l2: int, **fields: int) -> bytes:
    """With a table of reference counts, without which QEMU opens nothing."""
    made = bytearray(image({512: [l1, 0], 1024: list(l2), 3072: [3584]}, {2048: DATA}, size=SIZE, **fields))
    struct.pack_into(">QI", made, 48, 3072, 1)
    return bytes(made)


def by_qemu(path: Path) -> bytes | None:
    """The whole disk; None: it will not read it."""
    out = path.with_suffix(".raw")
    argv = [require("qemu-img"), "convert", "-f", "qcow2", "-O", "raw", str(path), str(out)]
    done = subprocess.run(argv, capture_output=True, check=False)
    return out.read_bytes() if done.returncode == 0 else None


IMAGES = {
    **{f"l1-{bit:#x}": with_entries(COPIED | 1024 | bit, COPIED | 2048) for bit in RESERVED_L1},
    **{f"l1-alone-{bit:#x}": with_entries(bit, COPIED | 2048) for bit in RESERVED_L1},
    **{
        f"l2-{bit:#x}": with_entries(COPIED | 1024, COPIED | 2048 | bit, bit, 1 | bit, 2048 | 1 | bit)
        for bit in RESERVED_L2
    },
    "corrupt": with_entries(COPIED | 1024, COPIED | 2048, features=2),
    "corrupt-and-dirty": with_entries(COPIED | 1024, COPIED | 2048, features=3),
    "zero-in-version-2": with_entries(COPIED | 1024, COPIED | 2048 | 1, version=2),
    "unknown-feature": with_entries(COPIED | 1024, COPIED | 2048, features=1 << 5),
}


@pytest.mark.parametrize("name", IMAGES)
async def test_the_same_bytes_or_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGES[name])
    expected = by_qemu(path)
    assert (expected is None) is (name in ("zero-in-version-2", "unknown-feature"))
    try:
        source, _ = await opened(IMAGES[name])
        found = await read(source, 0, SIZE)
    except SourceError:
        assert expected is None
    else:
        assert found == expected
        described = [(extent.pos, extent.size) for extent in await source.extents(0, SIZE) or () if extent.zero]
        assert all(not any(found[pos : pos + size]) for pos, size in described)


async def test_the_mark_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await opened(IMAGES["corrupt"])
    assert [record.getMessage() for record in caplog.records] == [
        "backing disk.qcow2 is marked as corrupt; it is read as it is, see qemu-img check"
    ]
