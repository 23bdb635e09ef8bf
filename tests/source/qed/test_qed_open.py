"""Which backings are taken for QED: what the overlay says comes first, then what the first bytes say."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qedfs.errors import SourceError
from qedfs.source.look import Look, look
from qedfs.source.open import remote_source
from qedfs.source.policy import Policy
from qedfs.source.retrying import RetryingSource
from qedfs.source.url import parse_location
from tests.harness.mounts import qedfs
from tests.source.qcow2.support import KiB, qemu_img
from tests.source.qed.support import qed_of

DISK = random.Random(6).randbytes(300 * KiB)
NO_PROBE = 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(qed_of(DISK))
    return path


@asynccontextmanager
async def remote(path: Path, *, raw: bool, expected: str | None = None) -> AsyncIterator[RetryingSource]:
    async with trio.open_nursery() as nursery:
        source = remote_source(parse_location(str(path)), Policy((str(path),)), nursery, raw=raw, expected=expected)
        try:
            yield source
        finally:
            await source.aclose()


async def content(source: RetryingSource) -> bytes:
    buffer = bytearray((await source.connect()).size)
    await source.read(0, memoryview(buffer))
    return bytes(buffer)


async def test_it_is_found_by_its_first_bytes_unless_the_overlay_calls_it_raw(base: Path) -> None:
    file = await trio.Path(base).read_bytes()
    for raw, expected, disk in ((False, None, DISK), (False, "qed", DISK), (True, None, file)):
        async with remote(base, raw=raw, expected=expected) as source:
            assert await content(source) == disk
    async with remote(base, raw=False, expected="qcow2") as source:
        with pytest.raises(SourceError, match="is not a qcow2 image: it looks like qed; say --backing-format qed"):
            await source.connect()
    found = await look(parse_location(str(base)), deadline_seconds=5)
    assert (found, str(found)) == (Look("qed", len(DISK), len(file)), f"qed, {len(file) >> 10} KiB, disk of 300 KiB")


async def test_a_header_that_a_guest_has_written_opens_no_other_file(tmp_path: Path) -> None:
    secret, forged = tmp_path / "secret", tmp_path / "forged"
    secret.write_bytes(b"secret" * 1024)
    qemu_img("create", "-q", "-f", "qed", "-b", secret, "-F", "raw", forged)
    async with remote(forged, raw=False) as source:
        with pytest.raises(SourceError, match="has a backing file of its own, which is never followed"):
            await source.connect()
    async with remote(forged, raw=True) as source:
        assert await content(source) == forged.read_bytes()


def features_of(overlay: Path) -> int:
    return int.from_bytes(overlay.read_bytes()[16:24], "little")


def test_create_makes_what_qemu_opens(tmp_path: Path, base: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(DISK)
    for number, options in enumerate(((), ("--backing-format", "qed"))):
        overlay = tmp_path / f"{number}.qed"
        done = qedfs("create", overlay, "--backing", base, *options)
        assert f"over {base} (qed, " in done.stdout
        assert not features_of(overlay) & NO_PROBE
        assert f'"virtual-size": {len(DISK)}' in qemu_img("info", "--output=json", overlay)
        qemu_img("compare", "-f", "qed", "-F", "raw", overlay, tmp_path / "disk.raw")
    qedfs("create", tmp_path / "raw.qed", "--backing", base, "--backing-format", "raw")
    assert features_of(tmp_path / "raw.qed") & NO_PROBE
    empty = tmp_path / "empty"
    qemu_img("create", "-q", "-f", "qed", empty, "0")
    done = qedfs("create", tmp_path / "no.qed", "--backing", empty, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "is a qed image of an empty disk" in done.stderr
