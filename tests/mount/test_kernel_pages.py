"""The kernel drops its pages of an image: through an open of another program, or else told directly."""

from __future__ import annotations

import errno
from pathlib import Path

import pyfuse3
import pytest

from qedfs.errors import QedfsError
from qedfs.mount import kernel_pages
from qedfs.mount.kernel_pages import KernelPages
from qedfs.mount.served import Served


def stale(name: str = "disk.raw") -> Served:
    served = Served(name, f"/overlays/{name}", 7, (1, 2, 3))
    served.stale_pages = True
    return served


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    told: list[int] = []
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda inode, attr_only: told.append(inode))
    return told


async def test_a_file_that_is_not_ours_proves_nothing(tmp_path: Path, told: list[int]) -> None:
    (tmp_path / "disk.raw").write_bytes(b"another file system is mounted there")
    await KernelPages(str(tmp_path)).drop(stale())
    assert told == [7]


async def test_our_answer_to_the_open_is_the_proof(
    tmp_path: Path, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, run = stale(), kernel_pages.run

    async def opening(argv: list[str]) -> int | None:
        served.note_open()
        return await run(argv)

    monkeypatch.setattr(kernel_pages, "run", opening)
    (tmp_path / "-n.raw").write_bytes(b"")
    served.name = "-n.raw"  # no option of the program that opens it
    await KernelPages(str(tmp_path)).drop(served)
    assert told == []


@pytest.mark.parametrize("words", [("/nonexistent",), ("false",)])
async def test_without_the_program_the_kernel_is_told(
    words: tuple[str, ...], tmp_path: Path, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_pages, "OPENER", words)
    await KernelPages(str(tmp_path)).drop(stale())
    assert told == [7]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
async def test_only_an_inode_without_pages_needs_no_drop(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(inode: int, attr_only: bool) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(pyfuse3, "invalidate_inode", refuse)
    if number == errno.ENOENT:
        await KernelPages(str(tmp_path)).drop(stale())
    else:
        with pytest.raises(QedfsError, match="does not drop"):
            await KernelPages(str(tmp_path)).drop(stale())


async def test_a_size_is_asked_for_by_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    run = kernel_pages.run

    async def running(argv: list[str]) -> int | None:
        ran.append(argv)
        return await run(argv)

    monkeypatch.setattr(kernel_pages, "run", running)
    pages = KernelPages(str(tmp_path))
    await pages.show_size(stale("-f.raw"))  # not there: the kernel asks later
    assert ran == [[*kernel_pages.ASKER, str(tmp_path / "-f.raw")]]
