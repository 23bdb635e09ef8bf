"""Which backings are taken for qcow2: what the overlay says comes first, then what the first bytes say."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qedfs.errors import SourceChanged, SourceError
from qedfs.source.open import remote_source
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.harness.mounts import qedfs
from tests.source.qcow2.support import KiB, convert, qemu_img

DISK = random.Random(6).randbytes(300 * KiB)
NO_PROBE = 4


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(DISK)
    return path


@pytest.fixture
def qcow2(tmp_path: Path, raw: Path) -> Path:
    convert(raw, tmp_path / "disk.qcow2")
    return tmp_path / "disk.qcow2"


@asynccontextmanager
async def remote(path: Path, *, raw: bool, expected: str | None = None) -> AsyncIterator[RetryingSource]:
    async with trio.open_nursery() as nursery:
        location = parse_location(str(path))
        source = remote_source(location, Policy((str(path),)), nursery, raw=raw, expected=expected)
        try:
            yield source
        finally:
            await source.aclose()


async def content(source: RetryingSource) -> bytes:
    buffer = bytearray((await source.connect()).size)
    await source.read(0, memoryview(buffer))
    return bytes(buffer)


async def test_qcow2_is_found_by_its_first_bytes(qcow2: Path) -> None:
    for expected in (None, "qcow2"):
        async with remote(qcow2, raw=False, expected=expected) as source:
            assert await content(source) == DISK
            assert await source.extents(0, 100) is not None


async def test_what_the_overlay_calls_raw_is_raw(qcow2: Path) -> None:
    file = await trio.Path(qcow2).read_bytes()
    async with remote(qcow2, raw=True) as source:
        assert await content(source) == file


async def test_what_nobody_knows_is_raw(raw: Path, tmp_path: Path) -> None:
    async with remote(raw, raw=False, expected="raw") as source:
        assert await content(source) == DISK
    empty = tmp_path / "empty"
    empty.touch()
    async with remote(empty, raw=False) as source:
        assert await content(source) == b""


@pytest.mark.parametrize("magic", [b"KDMV", b"vhdxfile", b"conectix"])
async def test_other_formats_are_refused(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(magic.ljust(KiB))
    async with remote(path, raw=False) as source:
        with pytest.raises(SourceError, match=r"looks like [A-Z]+ .*, not like a disk; .* say so: qemu-img rebase"):
            await source.connect()


async def test_another_format_than_the_user_has_named(raw: Path, qcow2: Path) -> None:
    for path, expected, found in [(raw, "qcow2", "a raw disk"), (qcow2, "raw", "qcow2")]:
        async with remote(path, raw=False, expected=expected) as source:
            with pytest.raises(SourceError, match=f"is not a {expected} image: it looks like {found}; "):
                await source.connect()


async def test_forged_header_opens_no_other_file(tmp_path: Path) -> None:
    """The guest of a raw disk has put a qcow2 header there that names a file of the host."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    forged = tmp_path / "forged"
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", forged)
    async with remote(forged, raw=False) as source:
        with pytest.raises(SourceError, match="has a backing file of its own, which is never followed"):
            await source.connect()
    async with remote(forged, raw=True) as source:
        assert await content(source) == forged.read_bytes()


async def test_image_that_is_replaced_between_connections(qcow2: Path, raw: Path) -> None:
    async with remote(qcow2, raw=False) as source:
        await source.connect()
        connection, source._source = source._source, None  # the next call opens another one
        assert connection is not None
        await connection.aclose()
        convert(raw, qcow2, "cluster_size=4k")
        with pytest.raises(SourceChanged, match=r"is another version: Last-Modified was .* of qcow2 file"):
            await source.connect()


# The command that makes the overlay.


def features_of(overlay: Path) -> int:
    return int.from_bytes(overlay.read_bytes()[16:24], "little")


def test_create_over_qcow2(tmp_path: Path, qcow2: Path) -> None:
    overlay = tmp_path / "disk.qed"
    qedfs("create", overlay, "--backing", qcow2, "--backing-format", "qcow2")
    assert f'"virtual-size": {len(DISK)}' in qemu_img("info", "--output=json", overlay)
    assert not features_of(overlay) & NO_PROBE
    qemu_img("compare", "-f", "qed", "-F", "raw", overlay, tmp_path / "disk.raw")


def test_create_over_raw_forbids_to_probe(tmp_path: Path, qcow2: Path) -> None:
    overlay = tmp_path / "disk.qed"
    qedfs("create", overlay, "--backing", qcow2, "--backing-format", "raw")
    assert features_of(overlay) & NO_PROBE
    assert f'"virtual-size": {qcow2.stat().st_size}' in qemu_img("info", "--output=json", overlay)


def test_create_over_what_is_not_qcow2(tmp_path: Path, raw: Path) -> None:
    overlay = tmp_path / "disk.qed"
    done = qedfs("create", overlay, "--backing", raw, "--backing-format", "qcow2", check=False)
    assert done.returncode == 4
    assert "is not a qcow2 image" in done.stderr
    assert not overlay.exists()
