"""Tables that are laid out ahead, and space that is reserved."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from qedfs.cli.locked_file import locked_file
from qedfs.errors import NoSpace, UsageError
from qedfs.format.tables import decode_table
from qedfs.overlay import create as create_module
from qedfs.overlay.check import check
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from qedfs.overlay.preallocation import Preallocation
from qedfs.overlay.session import read_header
from tests.harness.images import qemu_check, qemu_info, qemu_io
from tests.harness.mounts import qedfs
from tests.overlay.guest import no_fill

MIB = 1 << 20
SIZE = (3 << 30) + 512  # two tables map 2 GiB each


def l1_of(path: Path) -> list[int]:
    with locked_file(str(path), writable=False) as storage:
        header, _ = read_header(storage)
    with path.open("rb") as file:
        file.seek(header.l1_table_offset)
        return list(decode_table(file.read(header.geometry.table_bytes)))


def made(path: Path, preallocation: Preallocation, size: int = SIZE) -> Path:
    create_overlay(str(path), image_size=size, backing=None, preallocation=preallocation)
    return path


async def test_all_tables_lie_in_a_row_and_no_write_adds_one(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qed", Preallocation.METADATA)
    tables = l1_of(path)
    header_and_l1 = 65536 + 262144
    assert tables == [header_and_l1, header_and_l1 + 262144, *[0] * (len(tables) - 2)]
    assert path.stat().st_size == header_and_l1 + 2 * 262144
    assert path.stat().st_blocks * 512 <= 65536  # the tables are holes
    overlay = await open_overlay(str(path), writable=True)
    for pos in (0, 2 << 30, SIZE - 512):
        await overlay.write(pos, b"x" * 512, no_fill)
    await overlay.close()
    assert l1_of(path) == tables
    assert path.stat().st_size == header_and_l1 + 2 * 262144 + 3 * 65536
    assert qemu_check(path) == (0, 0)
    qemu_io(path, "read -P 120 0 512", f"read -P 120 {SIZE - 512} 512", "write -P 1 1G 64k")
    assert l1_of(path) == tables
    with locked_file(str(path), writable=False) as storage:
        report = check(storage, read_header(storage)[0])
    assert (report.tables, report.allocated, report.leaks, report.corruptions) == (2, 4, 0, 0)


async def test_the_whole_image_has_its_space_on_the_disk(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qed", Preallocation.FALLOC, 64 * MIB)
    assert path.stat().st_size == 65536 + 2 * 262144
    blocks = path.stat().st_blocks
    assert blocks * 512 >= 64 * MIB + 65536 + 2 * 262144
    overlay = await open_overlay(str(path), writable=True)
    for pos in range(0, 64 * MIB, MIB):
        await overlay.write(pos, b"y" * MIB, no_fill)
    await overlay.close()
    assert path.stat().st_size == 64 * MIB + 65536 + 2 * 262144
    assert path.stat().st_blocks <= blocks + 64  # the file system's own, for more extents
    assert qemu_check(path) == (0, 0)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EOPNOTSUPP, UsageError)])
def test_space_that_is_not_there(
    number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(create_module, "reserve", refuse)
    with pytest.raises(kind, match="disk"):
        made(tmp_path / "disk.qed", Preallocation.FALLOC)
    assert list(tmp_path.iterdir()) == []


def test_as_it_is_typed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    found = json.loads(qedfs("create", path, "--size", "3G", "--preallocation", "metadata", "--json").stdout)
    assert found["preallocation"] == "metadata"
    assert qemu_info(path)["virtual-size"] == 3 << 30
    assert path.stat().st_size == 65536 + 3 * 262144
