"""A raw file becomes a qcow2 file: what qemu-img makes, how it is followed and ended, and what its failures mean."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import trio

from qedfs.cli.exporting.qcow2_file import convert, qemu_img
from qedfs.cli.ui.copy_progress import CopyProgress
from qedfs.errors import NoSpace, QedfsError
from tests.harness.images import qemu_info, qemu_same, sparse_image
from tests.harness.require import require

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[BinaryIO]:
    """8 MiB with data at one place."""
    with sparse_image(tmp_path / "raw", 8 * MIB, {3 * MIB: b"x" * MIB}).open("rb") as file:
        yield file


@pytest.fixture
def target(tmp_path: Path) -> Iterator[BinaryIO]:
    with (tmp_path / "qcow2").open("w+b") as file:
        yield file


def program(folder: Path, script: str) -> str:
    """A qemu-img that does something else."""
    path = folder / "qemu-img"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(stat.S_IRWXU)
    return str(path)


def progress_of(size: int) -> CopyProgress:
    progress = CopyProgress("disk")
    progress.total = size
    return progress


async def test_the_holes_stay_holes_and_everything_is_counted(tmp_path: Path, raw: BinaryIO, target: BinaryIO) -> None:
    progress = progress_of(MIB)
    await convert(require("qemu-img"), raw.fileno(), target.fileno(), "disk", progress)
    assert progress.done == MIB
    assert qemu_info(tmp_path / "qcow2")["format"] == "qcow2"
    assert qemu_same(tmp_path / "raw", tmp_path / "qcow2", fmt="raw", other_fmt="qcow2")
    assert os.fstat(target.fileno()).st_blocks * 512 < 2 * MIB


async def test_a_file_that_may_not_grow(raw: BinaryIO, target: BinaryIO) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(NoSpace, match="disk: the file system, or a process limit"):
            await convert(require("qemu-img"), raw.fileno(), target.fileno(), "disk", progress_of(MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (
            "echo 'qemu-img: error while writing at byte 0: No space left on device' >&2; exit 1",
            NoSpace,
            "disk: the file system is full",
        ),
        ("echo 'qemu-img: Unknown driver' >&2; exit 1", QedfsError, "disk: qemu-img: Unknown driver"),
        ("exit 3", QedfsError, "disk: qemu-img: exit code 3"),
        ("kill -9 $$", QedfsError, "disk: qemu-img was ended by signal 9"),
    ],
)
async def test_a_failure_is_one_line(
    tmp_path: Path, raw: BinaryIO, target: BinaryIO, script: str, error: type[QedfsError], text: str
) -> None:
    with pytest.raises(error) as failed:
        await convert(program(tmp_path, script), raw.fileno(), target.fileno(), "disk", progress_of(MIB))
    assert str(failed.value) == text


async def test_its_messages_are_in_english(tmp_path: Path, raw: BinaryIO, target: BinaryIO) -> None:
    shown = program(tmp_path, 'echo "$LC_ALL" >&2; exit 1')
    with pytest.raises(QedfsError, match=r"qemu-img: C$"):
        await convert(shown, raw.fileno(), target.fileno(), "disk", progress_of(MIB))


async def test_progress_comes_in_any_pieces(tmp_path: Path, raw: BinaryIO, target: BinaryIO) -> None:
    script = r"printf '    (12.'; sleep 0.05; printf '50/100%%)\r    (50.00/100%%)\r    (7'; sleep 0.05; exit 0"
    progress = progress_of(1000)
    await convert(program(tmp_path, script), raw.fileno(), target.fileno(), "disk", progress)
    assert progress.done == 500


class Noticed(CopyProgress):
    """Says when something has been done."""

    def __init__(self) -> None:
        super().__init__("disk")
        self.total = MIB
        self.noticed = trio.Event()

    def add(self, size: int) -> None:
        super().add(size)
        self.noticed.set()


async def test_whoever_gives_up_ends_it(tmp_path: Path, raw: BinaryIO, target: BinaryIO) -> None:
    script = program(tmp_path, rf"echo $$ > {tmp_path}/pid; printf '(50.00/100%%)\r'; exec sleep 1000")
    progress = Noticed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(convert, script, raw.fileno(), target.fileno(), "disk", progress)
        await progress.noticed.wait()
        nursery.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QedfsError, match="package qemu-utils"):
        qemu_img()
