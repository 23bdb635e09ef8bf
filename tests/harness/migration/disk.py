"""The disk of the migrated guest: how it is laid out, made, and checked from outside.

An ext4 file system at its start, then numbered blocks, then the table of versions that the guest writes at its end
(`writer.c`, which must agree with this file).
"""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.images import sparse_image
from tests.harness.require import require

MIB = 1 << 20
BLOCK = 4096
SECTOR = 512
FILES = 64
FILE_LINES = 400
_MAGIC = 0x51444B21
_DOUBTFUL = 0x80000000
_CHUNK_BLOCKS = 256
_PREFIX = struct.Struct("<4I")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes in bytes, but `blocks`, which is a number of blocks and even."""

    fs_size: int = 16 * MIB
    blocks: int = 8192

    @property
    def table_pos(self) -> int:
        return self.fs_size + self.blocks * BLOCK

    @property
    def table_size(self) -> int:
        return (FILES + self.blocks) * 4

    @property
    def size(self) -> int:
        return self.table_pos + -(-self.table_size // MIB) * MIB


SMALL = Layout()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is wrong with a disk, in numbers of blocks and files; `fsck` is what e2fsck complained of."""

    stale: int
    foreign: int
    files: int
    fsck: str
    written: int  # blocks that the guest has written at least once

    @property
    def good(self) -> bool:
        return not (self.stale or self.foreign or self.files or self.fsck)


def make_disk(path: Path, layout: Layout = SMALL) -> Path:
    """A disk of which each block has version 0."""
    sparse_image(path, layout.fs_size)
    subprocess.run([require("mkfs.ext4"), "-q", "-F", "-E", "lazy_itable_init=0", str(path)], check=True)
    with path.open("r+b") as file:
        file.seek(layout.fs_size)
        for first in range(0, layout.blocks, _CHUNK_BLOCKS):
            last = min(first + _CHUNK_BLOCKS, layout.blocks)
            file.write(b"".join(content(block, 0) for block in range(first, last)))
        file.truncate(layout.size)
    return path


def content(block: int, version: int) -> bytes:
    """What the guest writes to a block."""
    return b"".join(
        _PREFIX.pack(_MAGIC, block, version, sector) * (SECTOR // _PREFIX.size) for sector in range(BLOCK // SECTOR)
    )


def check(path: Path, layout: Layout, table_sum: int) -> Verdict:
    """Compares a disk with the guest's own table; `table_sum` is what the guest said of it. The guest has ended.

    Raises:
        AssertionError: the table itself is not the guest's, so that nothing can be compared.
    """
    with path.open("rb") as file:
        file.seek(layout.table_pos)
        table = struct.unpack(f"<{FILES + layout.blocks}I", file.read(layout.table_size))
        assert checksum(table) == table_sum, "the table of versions on the disk is not the one that the guest wrote"
        files, versions = table[:FILES], table[FILES:]
        wrong = list(_wrong_blocks(file.fileno(), layout, versions))
    return Verdict(
        stale=sum(old for old in wrong),
        foreign=sum(not old for old in wrong),
        files=_wrong_files(path, files),
        fsck=_fsck(path),
        written=sum(1 for version in versions if version),
    )


def foreign_blocks(path: Path, layout: Layout) -> int:
    """How many blocks are no version of themselves, whatever their guest last wrote."""
    any_version = (_DOUBTFUL | (_DOUBTFUL - 1),) * layout.blocks
    with path.open("rb") as file:
        return len(list(_wrong_blocks(file.fileno(), layout, any_version)))


def _wrong_blocks(fd: int, layout: Layout, versions: tuple[int, ...]) -> Iterator[bool]:
    """For each wrong block, whether it is an old version of itself, whole or in part."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(layout.fs_size)
        for first in range(0, layout.blocks, _CHUNK_BLOCKS):
            last = min(first + _CHUNK_BLOCKS, layout.blocks)
            found = file.read((last - first) * BLOCK)
            if found == b"".join(content(block, versions[block]) for block in range(first, last)):
                continue
            for block in range(first, last):
                at = (block - first) * BLOCK
                yield from _judged(found[at : at + BLOCK], block, versions[block])


def _judged(found: bytes, block: int, version: int) -> Iterator[bool]:
    newest = version & ~_DOUBTFUL
    if found == content(block, newest):
        return
    sectors = [found[at : at + SECTOR] for at in range(0, BLOCK, SECTOR)]
    heads = [_PREFIX.unpack_from(sector) for sector in sectors]
    own = all(
        head[:2] == (_MAGIC, block) and head[3] == number and sector == _PREFIX.pack(*head) * (SECTOR // _PREFIX.size)
        for number, (head, sector) in enumerate(zip(heads, sectors, strict=True))
    )
    if own and version & _DOUBTFUL:
        return  # a write of it failed, and was told so: any version before may be there
    yield own and all(head[2] <= newest for head in heads)


def _wrong_files(path: Path, versions: tuple[int, ...]) -> int:
    with tempfile.TemporaryDirectory(prefix="qedfs-") as folder:
        argv = [require("debugfs"), "-R", f"rdump / {folder}", str(path)]
        subprocess.run(argv, check=True, capture_output=True)
        return sum(
            1
            for number, version in enumerate(versions)
            if version and not _file_is_right(Path(folder) / f"f{number:02}", number, version)
        )


def _file_is_right(path: Path, number: int, version: int) -> bool:
    if version & _DOUBTFUL:
        return True
    wanted = f"file {number} version {version}\n".encode() * FILE_LINES
    return path.exists() and path.read_bytes() == wanted


def _fsck(path: Path) -> str:
    done = subprocess.run([require("e2fsck"), "-f", "-n", str(path)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def checksum(words: tuple[int, ...]) -> int:
    """FNV-1a over the words of a table, as the guest counts it."""
    total = 2166136261
    for word in words:
        total = (total ^ word) * 16777619 & 0xFFFFFFFF
    return total
