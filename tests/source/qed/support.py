"""What the tests of the QED source share: images by qemu-img and by hand, and a slow, plain reader."""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qedfs.source.qed import QedSource
from tests.source.qcow2.support import MemorySource, qemu_img

KiB, MiB = 1 << 10, 1 << 20
CLUSTER = 4 * KiB  # of the images put together by hand, whose tables have one cluster: 512 entries
L1, L2, DATA = CLUSTER, 2 * CLUSTER, 4 * CLUSTER


def header(  # noqa: PLR0913 - the fields of a header
    *,
    magic: bytes = b"QED\0",
    cluster_size: int = CLUSTER,
    table_size: int = 1,
    header_size: int = 1,
    features: int = 0,
    compat: int = 0,
    autoclear: int = 0,
    l1_offset: int = L1,
    size: int = 1 << 20,
    name: tuple[int, int] = (64, 0),
) -> bytes:
    """The 64 bytes of a header."""
    numbers = (cluster_size, table_size, header_size, features, compat, autoclear, l1_offset, size, *name)
    return struct.pack("<4sIIIQQQQQII", magic, *numbers)


def image(
    tables: Mapping[int, list[int]],
    clusters: Mapping[int, bytes] | None = None,
    *,
    file_size: int = 1 << 16,
    **fields: int,
) -> bytes:
    """A file: `tables` holds u64 entries and `clusters` bytes, by offset."""
    content = bytearray(file_size)
    content[:64] = header(**fields)  # type: ignore[arg-type]
    for offset, entries in tables.items():
        content[offset : offset + 8 * len(entries)] = struct.pack(f"<{len(entries)}Q", *entries)
    for offset, data in (clusters or {}).items():
        content[offset : offset + len(data)] = data
    return bytes(content)


@functools.cache
def qed_of(disk: bytes, *options: str) -> bytes:
    """The bytes of a QED image by qemu-img; making one takes longer than most tests of it. `options`: those of `-o`."""
    with tempfile.TemporaryDirectory(prefix="qedfs-") as folder:
        raw, made = Path(folder) / "raw", Path(folder) / "image"
        raw.write_bytes(disk)
        qemu_img("convert", "-f", "raw", "-O", "qed", *(["-o", ",".join(options)] if options else []), raw, made)
        return made.read_bytes()


async def opened(content: bytes) -> tuple[QedSource, MemorySource]:
    """A QED source over `content`; the reads of opening it are not in the inner source's list."""
    inner = MemorySource(content)
    source = await QedSource.open(inner, "disk.qed")
    inner.reads.clear()
    return source, inner


async def read(source: QedSource, pos: int, size: int, *, urgent: bool = False) -> bytes:
    # Not zeros: what is meant to be zero has to be written.
    buffer = bytearray(b"\xa5" * size)
    await source.read(pos, memoryview(buffer), urgent=urgent)
    return bytes(buffer)


def plain_disk(content: bytes, pos: int, size: int) -> bytes:
    """Bytes of the disk, one cluster after the other, by the letter of the specification, which masks low bits.

    What the file does not have is zeros, so this understands more than is allowed.
    """

    def number(offset: int, length: int = 8) -> int:
        return int.from_bytes(content[offset : offset + length].ljust(length, b"\0"), "little")

    cluster_size, entries = number(4, 4), number(8, 4) * number(4, 4) // 8
    parts, end = [], pos + size
    while pos < end:
        index, skip = pos // cluster_size, pos % cluster_size
        table = number(number(40) + 8 * (index // entries))
        entry = number(table + 8 * (index % entries)) if table else 0
        offset = entry - entry % cluster_size
        cluster = content[offset : offset + cluster_size] if entry > 1 else b""
        parts.append(cluster.ljust(cluster_size, b"\0")[skip : skip + min(cluster_size - skip, end - pos)])
        pos += len(parts[-1])
    return b"".join(parts)
