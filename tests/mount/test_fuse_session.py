"""A session unmounts its own file system, in every case, and never another one."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pyfuse3
import pytest
import trio.testing

from qedfs.errors import QedfsError
from qedfs.mount import fuse_session, fuse_wait
from qedfs.mount.fuse_session import FileSystem, FuseSession
from qedfs.mount.mountpoint import MountInfo

OURS = MountInfo("0:57", "fuse.qedfs", b"/disk.qed")
OTHER = MountInfo("0:58", "tmpfs", b"tmpfs")


class Kernel:
    """The kernel's table at the mountpoint, and what libfuse and umount(8) were told to do about it."""

    def __init__(self) -> None:
        self.mounted: MountInfo | None = None
        self.readable = True
        self.refuses: BaseException | None = None  # raised by init, which has mounted before
        self.dead = False  # whether what is mounted there is
        self.told: list[str] = []

    def mount_info_at(self, _: str) -> MountInfo | None:
        if not self.readable:
            raise OSError("no descriptor is left")
        return self.mounted

    def init(self, *_: object) -> None:
        self.mounted = OURS
        if self.refuses is not None:
            raise self.refuses

    async def main(self, **_: int) -> None:
        """Ends at once: unmounted from outside, or cut."""

    def close(self, *, unmount: bool) -> None:
        self.told.append(f"close, unmount={unmount}")

    def unmount(self, _: str, *, lazy: bool) -> object:
        self.told.append(f"unmount, lazy={lazy}")
        self.mounted = None

        class Done:
            returncode = 0

        return Done


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    stand_in = Kernel()
    for name in ("init", "main", "close"):
        monkeypatch.setattr(pyfuse3, name, getattr(stand_in, name))
    for name in ("mount_info_at", "unmount"):
        monkeypatch.setattr(fuse_session, name, getattr(stand_in, name))
    monkeypatch.setattr(fuse_session, "is_dead", lambda _: stand_in.dead)
    monkeypatch.setattr(fuse_wait, "install", lambda *_, **__: None)
    return stand_in


def mount(folder: Path) -> FuseSession:
    session = FuseSession(str(folder))
    session.mount(cast("FileSystem", None), "/disk.qed", allow_other=False, read_only=False)
    return session


def test_a_session_unmounts_its_own(kernel: Kernel, tmp_path: Path) -> None:
    session = mount(tmp_path)
    assert (session.is_mounted, session.device) == (True, OURS.device)
    session.end()
    assert kernel.told == ["close, unmount=True"]


@pytest.mark.expect_log("another file system is mounted there now; it is left alone")
def test_another_file_system_is_left_alone(kernel: Kernel, tmp_path: Path) -> None:
    session = mount(tmp_path)
    kernel.mounted = OTHER
    session.end()
    assert kernel.told == ["close, unmount=False"]


@pytest.mark.expect_log("the table of mounts cannot be read")
def test_without_a_table_the_session_is_unmounted(kernel: Kernel, tmp_path: Path) -> None:
    kernel.readable = False
    session = mount(tmp_path)
    assert (session.is_mounted, session.device) == (False, "")
    session.end()
    assert kernel.told == ["close, unmount=True"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("from libfuse"), KeyboardInterrupt()])
def test_what_a_failed_mount_has_left_is_unmounted(kernel: Kernel, tmp_path: Path, error: BaseException) -> None:
    kernel.refuses = error
    with pytest.raises(QedfsError if isinstance(error, RuntimeError) else type(error)):
        mount(tmp_path)
    assert kernel.told == ["unmount, lazy=True"]


async def test_a_connection_that_was_cut_is_an_error_and_the_mount_is_taken_away(
    kernel: Kernel, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    session = mount(tmp_path)
    kernel.dead = True
    error = await session.answer()
    assert "its connection to the kernel was cut" in str(error)
    session.end()
    assert kernel.told == ["close, unmount=True", "unmount, lazy=True"]


async def test_an_unmount_from_outside_is_a_good_end(kernel: Kernel, tmp_path: Path) -> None:
    session = mount(tmp_path)
    kernel.mounted = None
    assert await session.answer() is None
    session.end()
    assert kernel.told == ["close, unmount=False"]


async def test_a_mount_that_has_taken_the_place_is_not_ours(kernel: Kernel, tmp_path: Path) -> None:
    """It may look the same in the kernel's table: the same overlays, and the number that ours has had."""
    session = mount(tmp_path)
    assert await session.answer() is None
    assert (session.is_mounted, session.device) == (False, "")
