"""The checker of migrated disks finds what it has to find, and a disk that was moved without a standby is wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.harness.mounts import mounted, qedfs
from tests.harness.servers import qemu_nbd

from . import flow
from .disk import BLOCK, FILES, SECTOR, SMALL, Layout, check, checksum, content, make_disk
from .machine import machine

LAYOUT = Layout(fs_size=4 << 20, blocks=16)


def _disk(path: Path, versions: dict[int, int]) -> tuple[Path, int]:
    """A disk as a guest leaves it that has written these versions, and the checksum of its table."""
    make_disk(path, LAYOUT)
    table = [0] * FILES + [versions.get(block, 0) for block in range(LAYOUT.blocks)]
    with path.open("r+b") as file:
        for block, version in versions.items():
            file.seek(LAYOUT.fs_size + block * BLOCK)
            file.write(content(block, version))
        file.seek(LAYOUT.table_pos)
        file.write(struct.pack(f"<{len(table)}I", *table))
    return path, checksum(tuple(table))


def _put(path: Path, pos: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(LAYOUT.fs_size + pos)
        file.write(data)


def test_the_disk_of_a_guest_is_right(tmp_path: Path) -> None:
    path, table = _disk(tmp_path / "disk", {3: 7, 9: 1})
    verdict = check(path, LAYOUT, table)
    assert verdict.good
    assert verdict.written == 2


@pytest.mark.parametrize(
    ("pos", "data", "stale"),
    [
        (3 * BLOCK, content(3, 6), True),
        (3 * BLOCK + 2 * SECTOR, content(3, 6)[2 * SECTOR : 3 * SECTOR], True),
        (3 * BLOCK, content(3, 8), False),
        (3 * BLOCK, content(4, 7), False),
        (3 * BLOCK, bytes(BLOCK), False),
        (5 * BLOCK + 100, b"x", False),
    ],
    ids=["old", "torn", "from the future", "of another place", "zeros", "one byte"],
)
def test_a_wrong_block_is_found(tmp_path: Path, pos: int, data: bytes, stale: bool) -> None:
    path, table = _disk(tmp_path / "disk", {3: 7})
    _put(path, pos, data)
    verdict = check(path, LAYOUT, table)
    assert (verdict.stale, verdict.foreign) == (stale, not stale)


def test_a_broken_file_system_is_found(tmp_path: Path) -> None:
    path, table = _disk(tmp_path / "disk", {})
    with path.open("r+b") as file:
        file.seek(1024 + 12)  # the count of free blocks in ext4's superblock
        file.write(b"\0\0\0\0")
    assert check(path, LAYOUT, table).fsck


@pytest.mark.slow
def test_a_disk_that_is_mounted_before_the_source_has_stopped_is_stale(tmp_path: Path) -> None:
    """Why there is a standby: without it, what is fetched while the source still writes stays."""
    disk = make_disk(tmp_path / "disk.raw")
    with machine(["-drive", f"if=virtio,file={disk},format=raw,cache=none"]) as source, qemu_nbd(disk) as server:
        source.wait_working(10)
        qedfs("create", tmp_path / "disk.qed", "--backing", server.url)
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--allow-backing", "/", "--no-stream") as mount:
            mount.path("disk.raw").read_bytes()
            source.wait_working(200)
            there = ["-drive", f"if=virtio,file={mount.path('disk.raw')},format=raw,cache=none"]
            with machine(there, incoming=True) as destination:
                flow.prepare(source, destination)
                flow.switch(source, destination, flow.begin(source, destination))
                table = destination.finish()
            verdict = check(mount.path("disk.raw"), SMALL, table)
    assert verdict.stale > 0
