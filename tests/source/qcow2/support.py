"""What the qcow2 tests share: a file in memory that counts its reads, images by qemu-img, and a slow, plain reader."""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

import trio

from qedfs.errors import SourceUnreachable
from qedfs.source.base import Extent, Identity
from qedfs.source.qcow2 import Qcow2Source
from tests.harness.require import require

KiB, MiB = 1 << 10, 1 << 20


class MemorySource:
    """A well-behaved inner source, whose reads can be seen, held up and made to fail."""

    def __init__(self, content: bytes, identity: Identity | None = None) -> None:
        self.identity = identity or Identity(len(content), name="memory")
        self.content = content
        self.reads: list[tuple[int, int, bool]] = []  # offset, size, urgent
        self.gate: trio.Event | None = None  # reads wait for it
        self.failure: Exception | None = None  # of the next read
        self.closed = False

    @property
    def received(self) -> int:
        return sum(size for _, size, _ in self.reads)

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        if pos < 0 or pos + len(buffer) > len(self.content):
            raise ValueError(f"{pos}+{len(buffer)} of {len(self.content)}")
        self.reads.append((pos, len(buffer), urgent))
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self.closed:
            raise SourceUnreachable("memory: closed")
        buffer[:] = self.content[pos : pos + len(buffer)]

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        raise AssertionError("holes of the file say nothing about the disk")

    async def aclose(self) -> None:
        self.closed = True


async def opened(content: bytes) -> tuple[Qcow2Source, MemorySource]:
    """A qcow2 source over `content`; the reads of opening it are not in the inner source's list."""
    inner = MemorySource(content)
    source = await Qcow2Source.open(inner, "disk.qcow2")
    inner.reads.clear()
    return source, inner


async def read(source: Qcow2Source, pos: int, size: int, *, urgent: bool = False) -> bytes:
    # Not zeros: what is meant to be zero has to be written.
    buffer = bytearray(b"\xa5" * size)
    await source.read(pos, memoryview(buffer), urgent=urgent)
    return bytes(buffer)


def convert(raw: Path, image: Path, *options: str, compress: bool = False) -> bytes:
    """Converts a raw file with qemu-img; `options` are those of `-o`. Returns the image's bytes."""
    argv = ["convert", "-f", "raw", "-O", "qcow2", *(["-c"] if compress else [])]
    qemu_img(*argv, *(["-o", ",".join(options)] if options else []), raw, image)
    return image.read_bytes()


def qemu_img(*args: str | Path) -> str:
    done = subprocess.run([require("qemu-img"), *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def qemu_io(image: Path, *commands: str) -> None:
    argv: list[str | Path] = [require("qemu-io"), "-f", "qcow2", image]
    for command in commands:
        argv += ["-c", command]
    subprocess.run(argv, check=True, capture_output=True)


class Damaged(Exception):
    """The plain reader cannot make sense of the image."""


def plain_disk(content: bytes, pos: int, size: int) -> bytes:
    """Bytes of the disk, one cluster after the other, by the letter of the specification and nothing else.

    What the file does not have is zeros. Reserved bits are not looked at, so this understands more than is allowed. As
    for QEMU, what follows a whole cluster in its compressed bytes is of no matter.
    """

    def number(offset: int, length: int = 8) -> int:
        return int.from_bytes(content[offset : offset + length].ljust(length, b"\0"), "big")

    version, bits, l1 = number(4, 4), number(20, 4), number(40)
    cluster_size, parts = 1 << bits, []
    end = pos + size
    while pos < end:
        index, skip = pos >> bits, pos & (cluster_size - 1)
        table = number(l1 + 8 * (index >> (bits - 3))) & 0x00FFFFFFFFFFFE00
        entry = number(table + 8 * (index & ((cluster_size >> 3) - 1))) if table else 0
        if entry >> 62 & 1:
            cluster = _unpacked(content, entry, bits)
        elif (entry & 1 and version == 3) or not entry & 0x00FFFFFFFFFFFE00:
            cluster = bytes(cluster_size)
        else:
            offset = entry & 0x00FFFFFFFFFFFE00
            cluster = content[offset : offset + cluster_size].ljust(cluster_size, b"\0")
        parts.append(cluster[skip : skip + min(cluster_size - skip, end - pos)])
        pos += len(parts[-1])
    return b"".join(parts)


def _unpacked(content: bytes, entry: int, bits: int) -> bytes:
    split = 62 - (bits - 8)
    offset = entry & ((1 << split) - 1)
    stop = (offset // 512 + ((entry & ((1 << 62) - 1)) >> split) + 1) * 512
    try:
        plain = zlib.decompressobj(-15).decompress(content[offset:stop], 1 << bits)
    except zlib.error as exc:
        raise Damaged(str(exc)) from exc
    if len(plain) < 1 << bits:
        raise Damaged("short")
    return plain
