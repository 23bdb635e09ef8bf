"""What is no raw disk is not taken for one: packed files and foreign images, made by the programs that make them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import zstandard

from qedfs.errors import SourceError
from qedfs.source.open import remote_source
from qedfs.source.policy import Policy
from qedfs.source.probe import HEAD_BYTES, TAIL_BYTES, probe
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.mounts import qedfs
from tests.source.qcow2.support import qemu_img

KiB = 1024
DISK = random.Random(8).randbytes(64 * KiB) + bytes(192 * KiB)
NO_PROBE = 4


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("disk.raw", DISK)
    return file.getvalue()


def tarred(*names: str, form: int = tarfile.PAX_FORMAT) -> Callable[[], bytes]:
    def make() -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(DISK)
                archive.addfile(member, io.BytesIO(DISK))
        return file.getvalue()

    return make


PACKED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "xz": ("xz", lambda: lzma.compress(DISK)),
    "lzma": ("lzma", lambda: lzma.compress(DISK, lzma.FORMAT_ALONE)),
    "gzip": ("gzip", lambda: gzip.compress(DISK)),
    "bzip2": ("bzip2", lambda: bz2.compress(DISK)),
    "bzip2-empty": ("bzip2", lambda: bz2.compress(b"")),
    "zstd": ("zstd", lambda: zstandard.compress(DISK)),
    "lz4": ("lz4", lambda: b"\x04\x22\x4d\x18\x64\x40\xa7" + DISK),
    "skippable": ("zstd or lz4", lambda: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + DISK),
    "zip": ("zip", zipped),
    "7z": ("7z", lambda: b"7z\xbc\xaf\x27\x1c\0\4" + DISK),
    "ova": ("OVA", tarred("vm.ovf", "vm-disk1.vmdk")),
    "tar": ("tar", tarred("disk.raw")),
    "old-gnu-tar": ("tar", tarred("disk.raw", form=tarfile.GNU_FORMAT)),
    "login-page": ("a web page", lambda: b"\n<!DOCTYPE HTML><title>Sign in</title>" + DISK),
    "page": ("a web page", lambda: b"<!-- (c) --><body>" + b"Sign in. " * 10_000),
    "listing": ("a web page", lambda: b"<h1>Index of /</h1>"),
    "xml": ("XML", lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "xml-alone": ("XML", lambda: b"<Error><Code>NoSuchKey</Code></Error>"),
    "json": ("JSON", lambda: b'{"error": "unauthorized"}\n'),
    "json-array": ("JSON", lambda: b'[ {"name": "disk.raw"} ]' + b" " * 1000),
    "sums": ("plain text", lambda: b"d41d8cd98f00b204e9800998ecf8427e  disk.raw\n"),
    "text": ("plain text", lambda: "Zugriff verweigert: Schlüssel fehlt\r\n".encode() * 40),
    "lfs": ("a Git LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
    "torrent": ("a BitTorrent file", lambda: b"d8:announce26:udp://" + DISK),
}

IMAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "qcow1": ("qcow (version 1)", ("-f", "qcow")),
    "vmdk": ("VMDK", ("-f", "vmdk")),
    "vmdk-stream": ("VMDK", ("-f", "vmdk", "-o", "subformat=streamOptimized")),
    "vdi": ("VDI", ("-f", "vdi")),
    "vhdx": ("VHDX", ("-f", "vhdx")),
    "vhd-dynamic": ("VHD", ("-f", "vpc")),
    "vhd-fixed": ("VHD", ("-f", "vpc", "-o", "subformat=fixed")),
    "parallels": ("Parallels", ("-f", "parallels")),
}


def foreign(name: str, folder: Path) -> tuple[str, bytes]:
    """What it is called, and the bytes of the file."""
    if name in PACKED:
        called, make = PACKED[name]
        return called, make()
    called, options = IMAGES[name]
    qemu_img("create", "-q", *options, folder / "made", "4M")
    return called, (folder / "made").read_bytes()


def features_of(overlay: Path) -> int:
    return int.from_bytes(overlay.read_bytes()[16:24], "little")


@contextmanager
def backing(content: bytes) -> Iterator[FakeHttpServer]:
    with FakeHttpServer(content) as server:
        yield server


@pytest.mark.parametrize("name", [*PACKED, *IMAGES])
async def test_what_is_no_raw_disk_is_refused(name: str, tmp_path: Path) -> None:
    called, content = foreign(name, tmp_path)
    where = "last" if name == "vhd-fixed" else "first"
    with backing(content) as server:
        not_qcow2 = f"is not a qcow2 image: it looks like {called}; "
        no_disk = f"looks like {called} (its {where} bytes), not like a disk; "
        for expected, says in (("qcow2", not_qcow2), (None, no_disk)):
            async with trio.open_nursery() as nursery:
                location = parse_location(server.url())
                remote = remote_source(location, Policy(), nursery, raw=False, expected=expected)
                with pytest.raises(SourceError) as caught:
                    await remote.connect()
                await remote.aclose()
            assert says in str(caught.value)
            # The way out, which is not the same for all of them.
            ways = (
                "unpack it",
                "qemu-img convert",
                "take the",
                "check what",
                "see in a browser",
                "see with curl",
                "download",
            )
            assert any(way in str(caught.value) for way in ways)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\0" * HEAD_BYTES,
        b"\xeb\x63\x90".ljust(510, b"\x1f") + b"\x55\xaa",  # boot code of GRUB
        b"\xfa\x33\xc0\x8e\xd0\xbc".ljust(510, b"\0") + b"\x55\xaa",
        b"LUKS\xba\xbe\0\2",
        b"\x1f\x8b",
        b"BZh9 is no compressed file",
        b"]\0\0 is none either",
        b"<htmlish",
        b"ustar",
        bytes(HEAD_BYTES - 8) + b"EFI PART",
        b"hsqs\x07\0\0\0",  # squashfs
        b"XFSB\0\0\x10\0",
        b"\xeb\x52\x90NTFS    ".ljust(510, b"\0") + b"\x55\xaa",
        b"\xeb\x3c\x90mkfs.fat".ljust(510, b"\0") + b"\x55\xaa",
        b"MZ\xea\x07\0\xc0\x07".ljust(510, b"\0") + b"\x55\xaa",  # boot code of a Linux kernel of old
        b"LABELONE\1",  # LVM
        b"PK\0",
        b"{\0\0\0",
        b'{"key": "value"}\0',
        b"text that somebody has put on a disk ".ljust(HEAD_BYTES, b"."),
    ],
)
def test_what_a_raw_disk_may_begin_with(head: bytes) -> None:
    assert probe(head, head[-TAIL_BYTES:]).name == "raw"
    disk = head.ljust(HEAD_BYTES, b"\0")
    for size in (512, 40_000 // 512 * 512, 1 << 40, (1 << 40) + 1):
        assert probe(disk, bytes(TAIL_BYTES), size=size, media_type="text/plain").name == "raw"


def test_what_a_server_calls_a_disk_does_not_make_it_a_page() -> None:
    """Many servers call files of a kind that they do not know text/html."""
    boot = b"\xeb\x63\x90".ljust(HEAD_BYTES, b"\x1f")
    for head in (boot, bytes(HEAD_BYTES), DISK[:HEAD_BYTES]):
        assert probe(head, head, size=1 << 30, media_type="text/html").name == "raw"
    words = b"Please sign in. ".ljust(HEAD_BYTES, b".")
    assert probe(words, words, size=1 << 30, media_type="text/html").name == "a web page"
    assert probe(words, words, size=1 << 30, media_type="text/plain").name == "raw"


@pytest.mark.parametrize(("size", "name"), [(1000, "plain text"), (1024, "raw"), ((64 << 10) + 1, "raw")])
def test_text_is_refused_only_if_it_can_hardly_be_a_disk(size: int, name: str) -> None:
    text = b"words and words." * 32
    assert probe(text, text, size=size).name == name
    assert probe(text, bytes(TAIL_BYTES), size=size).name == "raw"


def test_create_refuses_and_raw_has_the_last_word(tmp_path: Path) -> None:
    overlay = tmp_path / "disk.qed"
    with backing(lzma.compress(DISK)) as server:
        done = qedfs("create", overlay, "--backing", server.url(), check=False)
        assert done.returncode == SourceError.exit_code
        assert "looks like xz (its first bytes), not like a disk; unpack it first (xz -d)" in done.stderr
        assert done.stderr.endswith("say so: --backing-format raw\n")
        qedfs("create", overlay, "--backing", server.url(), "--backing-format", "raw")
        assert features_of(overlay) & NO_PROBE


def test_what_nobody_has_looked_at_is_left_open(tmp_path: Path) -> None:
    """With --offline nobody asks the server; the mount does."""
    for name, options, raw in (("open", (), 0), ("said", ("--backing-format", "raw"), NO_PROBE)):
        overlay = tmp_path / name
        qedfs("create", overlay, "--backing", "http://127.0.0.1:9/disk.xz", "--offline", "--size", "1M", *options)
        assert features_of(overlay) & NO_PROBE == raw


async def test_what_is_recorded_as_raw_is_never_looked_at() -> None:
    content = gzip.compress(DISK)
    with backing(content) as server:
        async with trio.open_nursery() as nursery:
            remote = remote_source(parse_location(server.url()), Policy(), nursery, raw=True)
            assert (await remote.connect()).size == len(content)
            assert len(server.requests) == 1
            await remote.aclose()
