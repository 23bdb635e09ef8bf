"""A file that others may write to is copied as it was at one moment, or not at all. A file of the disk stands for one
in a mount, whose times move as well: tests/mount/test_mounted_times.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qedfs.cli.digest_option import ExpectedDigest
from qedfs.cli.exporting import image_export as module
from qedfs.cli.exporting.image_export import PIECE_BYTES, export_image
from qedfs.cli.exporting.overlay_export import Asking, Export
from qedfs.cli.ui.copy_progress import CopyProgress
from qedfs.errors import InUse, QedfsError, UsageError
from qedfs.source.credentials import Credentials
from qedfs.source.pinning import By, Pinning
from tests.harness.images import sparse_image

SIZE = 4 * PIECE_BYTES + 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a hole of more than a piece, data that ends in the last sector."""
    parts = {0: b"a" * 100_000, 3 * PIECE_BYTES - 4096: b"b" * (PIECE_BYTES + 4608)}
    return sparse_image(tmp_path / "disk.raw", SIZE, parts)


def export(image: Path, digest: str | None = None) -> Export:
    asking = Asking((), Credentials(), 30, Pinning(By.ALL, None), with_backing=False)
    return Export(str(image), str(image), asking, CopyProgress("disk"), ExpectedDigest(digest) if digest else None)


def test_a_file_has_the_bytes_the_holes_and_the_digest(tmp_path: Path, image: Path) -> None:
    job = export(image, hashlib.sha256(image.read_bytes()).hexdigest())
    with (tmp_path / "copy").open("w+b") as target:
        written = trio.run(export_image, str(image), "", job, target)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks <= image.stat().st_blocks + 2 * (64 << 10) // 512
    assert written["size"] == job.progress.done == job.progress.total == SIZE
    assert written["data_size"] <= 2 * PIECE_BYTES
    with (tmp_path / "copy").open("w+b") as target, pytest.raises(QedfsError, match=r"disk\.raw: its sha256 is"):
        trio.run(export_image, str(image), "", export(image, "0" * 64), target)


def test_a_pipe_gets_every_byte(image: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    trio.run(export_image, str(image), "", export(image, hashlib.sha256(image.read_bytes()).hexdigest()), None)
    assert capfdbinary.readouterr().out == image.read_bytes()


def test_nothing_but_zeros(tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "disk.raw", SIZE)
    with (tmp_path / "copy").open("w+b") as target:
        assert trio.run(export_image, str(image), "", export(image), target) == {"size": SIZE, "data_size": 0}
    assert (tmp_path / "copy").read_bytes() == bytes(SIZE)


def write(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(SIZE - 512)
        file.write(b"!")


def grow(image: Path) -> None:
    os.truncate(image, 2 * SIZE)


@pytest.mark.parametrize("change", [write, grow])
@pytest.mark.parametrize("piece", [1, 3])
def test_a_write_meanwhile_ends_it(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], piece: int
) -> None:
    reads: list[int] = []
    read_next = module._read_next

    def read_and_write(fd: int, path: str, pos: int, size: int) -> tuple[int, bytes]:
        found = read_next(fd, path, pos, size)
        reads.append(pos)
        if len(reads) == piece:
            change(image)
        return found

    monkeypatch.setattr(module, "_read_next", read_and_write)
    with (tmp_path / "copy").open("w+b") as target, pytest.raises(InUse, match=r"suspend its guest.*no room"):
        trio.run(export_image, str(image), "no room", export(image), target)
    assert len(reads) == piece


def test_there_is_no_such_image(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.raw: No such file"):
        trio.run(export_image, str(tmp_path / "none.raw"), "", export(tmp_path), None)
