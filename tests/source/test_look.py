"""What a look at a backing finds, and how little it asks for."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from qedfs.errors import SourceError
from qedfs.source.look import Look, look
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.hang import HANG_SECONDS
from tests.harness.servers import nginx, qemu_nbd
from tests.source.qcow2.support import qemu_img

MiB = 1 << 20
DISK = random.Random(3).randbytes(MiB) + bytes(2 * MiB)


async def seen(url: str | Path, backing_format: str | None = None) -> Look:
    return await look(parse_location(str(url)), backing_format=backing_format, deadline_seconds=HANG_SECONDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(DISK)
    for name, options in (("disk.qcow2", ()), ("zstd.qcow2", ("-o", "compression_type=zstd"))):
        qemu_img("convert", "-c", "-O", "qcow2", *options, tmp_path / "disk.raw", tmp_path / name)
    return tmp_path


async def test_a_raw_disk_costs_two_requests_of_a_sector(folder: Path) -> None:
    with nginx(folder) as server:
        assert await seen(f"{server.url}/disk.raw") == Look("raw", len(DISK), len(DISK))
        server.stop()
        assert server.ranges() == ["bytes=0-511", f"bytes={len(DISK) - 512}-{len(DISK) - 1}"]
        assert server.body_bytes() == 1024


@pytest.mark.parametrize(("name", "compression"), [("disk.qcow2", "zlib"), ("zstd.qcow2", "zstd")])
async def test_a_qcow2_image_costs_its_header_and_first_table(folder: Path, name: str, compression: str) -> None:
    size = (folder / name).stat().st_size
    with nginx(folder) as server:
        found = await seen(f"{server.url}/{name}")
        assert await seen(f"{server.url}/{name}", "qcow2") == found
        server.stop()
        assert len(server.ranges()) == 2 * 3
        assert server.body_bytes() < 2 * 1024
    assert found == Look("qcow2", len(DISK), size, compression)


async def test_what_the_user_calls_raw_is_not_looked_at(folder: Path) -> None:
    size = (folder / "disk.qcow2").stat().st_size
    with nginx(folder) as server:
        assert await seen(f"{server.url}/disk.qcow2", "raw") == Look("raw", size, size)
        server.stop()
        assert server.ranges() == ["bytes=0-511"]


async def test_a_header_that_a_guest_has_written_is_told(tmp_path: Path) -> None:
    """The user sees what was found, and says that it is raw if it is not what he means."""
    forged = tmp_path / "disk.raw"
    forged.write_bytes(DISK)
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "header", "8G")
    header = (tmp_path / "header").read_bytes()
    with forged.open("r+b") as file:
        file.write(header)
    found = await seen(forged)
    assert str(found) == "qcow2, zlib, 3.00 MiB, disk of 8.00 GiB"
    assert str(await seen(forged, "raw")) == "raw, 3.00 MiB"


async def test_over_nbd(folder: Path) -> None:
    with qemu_nbd(folder / "disk.raw") as server:
        assert await seen(server.url) == Look("raw", len(DISK), len(DISK))


async def test_nothing_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "0")
    for name, backing_format in (("disk", None), ("disk", "raw"), ("disk.qcow2", None)):
        with pytest.raises(SourceError, match="0 bytes"):
            await seen(tmp_path / name, backing_format)


@pytest.mark.parametrize("redirected", [False, True])
async def test_a_login_page_is_named_by_where_it_is(redirected: bool) -> None:
    page = b"<!DOCTYPE html><title>Sign in</title>"
    with FakeHttpServer(page) as login, FakeHttpServer(DISK) as server:
        server.behaviour, server.redirect_to = "redirect-302", login.url("/login?next=secret")
        url = server.url() if redirected else login.url("/disk.raw")
        with pytest.raises(SourceError) as caught:
            await seen(url)
    where = f"{url} (redirected to {login.url('/login?next=...')})" if redirected else url
    assert str(caught.value).startswith(f"backing {where} looks like a web page (its first bytes), not like a disk; ")


async def test_a_listing_without_ranges_is_called_a_page(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with nginx(tmp_path, location="autoindex on;") as server:
        for path in ("images/", "images"):
            with pytest.raises(SourceError, match=r"a web page \(text/html\); .* a list of files"):
                await seen(f"{server.url}/{path}")


def test_what_was_found_in_words() -> None:
    found = Look("qcow2", 3 << 30, 325 * MiB, "zlib")
    assert str(found) == "qcow2, zlib, 325 MiB, disk of 3.00 GiB"
    assert str(dataclasses.replace(found, compression=None)) == "qcow2, 325 MiB, disk of 3.00 GiB"
    assert str(Look("raw", 3 << 30, 3 << 30)) == "raw, 3.00 GiB"
