"""A mount whose server is replaced by one of another version of qedfs, with another hand-over and another journal.

The next version is this one, patched: it reads both formats and writes its own, as a real one should, or its own only.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qedfs as package
from tests.harness.mounts import Mount, mounted, qedfs

from .outlives import kill_server, servers, wait_for_takeover, wait_until_serving
from .support import MIB, Origin, create, opened, origin

# In the next version, and in one that has forgotten this one.
FORMAT = ('FORMAT = "2"', 'FORMAT = "3"')
READABLE = ('READABLE = frozenset({"1", FORMAT})', 'READABLE = frozenset({"2", FORMAT})')
JOURNAL = ('_MAGIC = b"qedfsj\\0\\5"', '_MAGIC = b"qedfsj\\0\\6"')
JOURNALS = ("_MAGICS = (_MAGIC,", '_MAGICS = (_MAGIC, b"qedfsj\\0\\5",')

THIS = Path(package.__file__).parent


class Installation:
    """Where the version that is installed lies: an update is another one in its place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.env = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
        folder.mkdir()
        (folder / "qedfs").symlink_to(THIS)
        keep_bytecode(folder / "qedfs")

    def install(self, version: Path) -> None:
        """Put a version in the place of the one that is there."""
        fresh = self._folder / "fresh"
        fresh.symlink_to(version)
        fresh.rename(self._folder / "qedfs")


def patched(folder: Path, **files: tuple[tuple[str, str], ...]) -> Path:
    """A copy of this version with some words changed: `room__module=((before, after), ...)`."""
    shutil.copytree(THIS, folder)
    keep_bytecode(folder)
    for name, changes in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        text = path.read_text()
        for before, after in changes:
            assert text.count(before) == 1
            text = text.replace(before, after)
        path.write_text(text)
    return folder


def keep_bytecode(folder: Path) -> None:
    """Let a copy of this version have its bytecode, which knows its source by time and size: to compile takes a second.

    Beside the source a copy has it already; elsewhere it is kept by path (`tests/__init__.py`).
    """
    if sys.pycache_prefix:
        here, there = (Path(f"{sys.pycache_prefix}{path}") for path in (THIS, folder))
        shutil.copytree(here, there, dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def no_bytecode_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    if sys.pycache_prefix:
        shutil.rmtree(f"{sys.pycache_prefix}{tmp_path}", ignore_errors=True)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Origin]:
    with origin(tmp_path, MIB) as found:
        create(tmp_path / "disk.qed", found.url)
        yield found


@pytest.fixture
def installed(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "installed")


@pytest.fixture
def old() -> Path:
    return THIS


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A version that reads what this one leaves, and leaves what this one cannot read."""
    return patched(tmp_path / "new", mount__held=(FORMAT, READABLE), overlay__journal=(JOURNAL, JOURNALS))


@pytest.fixture
def mount(tmp_path: Path, source: Origin, installed: Installation) -> Iterator[Mount]:
    words = (tmp_path / "disk.qed", tmp_path / "mnt", "--restart", "--no-stream")
    with mounted(*words, env=installed.env, own_interpreter=True) as found:
        wait_until_serving(found)
        yield found


def content(overlay: Path, mountpoint: Path, env: dict[str, str]) -> bytes:
    """What the version that is installed reads there."""
    with mounted(overlay, mountpoint, "--no-stream", "--no-restart", env=env, own_interpreter=True) as again:
        return again.path("disk.raw").read_bytes()


def test_an_upgrade_to_a_version_that_cannot_read_this_one_changes_nothing(
    tmp_path: Path, mount: Mount, installed: Installation
) -> None:
    with opened(mount.path("disk.raw")) as fd:
        os.pwrite(fd, b"before", 0)
        before = servers(mount.pid)
        installed.install(patched(tmp_path / "forgetful", mount__held=(FORMAT,)))
        done = qedfs("upgrade", mount.mountpoint, check=False)
        assert done.returncode == 1
        assert "could not start, so the old one serves on: another version of qedfs has left a state of" in done.stderr
        assert servers(mount.pid) == before
        assert os.pread(fd, 6, 0) == b"before"
    assert mount.unmount() == 0


def test_a_crash_under_a_version_that_cannot_read_this_one_ends_the_mount_with_the_reason(
    tmp_path: Path, source: Origin, mount: Mount, installed: Installation, old: Path
) -> None:
    with mount.path("disk.raw").open("r+b", buffering=0) as image:
        image.write(b"written")
    installed.install(patched(tmp_path / "forgetful", mount__held=(FORMAT,)))
    kill_server(mount)
    assert mount.wait_exit() == 1
    assert "another version of qedfs has left a state of format 2, which this one cannot read" in mount.output()
    assert "the mount is taken away" in mount.output()
    assert not os.path.ismount(mount.mountpoint)
    installed.install(old)
    assert content(tmp_path / "disk.qed", tmp_path / "again", installed.env) == b"written" + source.data()[7:]


def test_the_next_version_takes_over_and_nobody_goes_back_by_accident(
    tmp_path: Path, source: Origin, mount: Mount, installed: Installation, old: Path, new: Path
) -> None:
    with opened(mount.path("disk.raw")) as fd:
        os.pwrite(fd, b"one", 0)
        installed.install(new)
        kill_server(mount)  # it reads the journal of the other one, too
        wait_for_takeover(mount, 1)
        os.pwrite(fd, b"two", 70_000)
        installed.install(old)
        done = qedfs("upgrade", mount.mountpoint, check=False)
        assert "the old one serves on: another version of qedfs has left a state of format 3" in done.stderr
        os.pwrite(fd, b"three", 140_000)
        expected = bytearray(source.data())
        for at, text in ((0, b"one"), (70_000, b"two"), (140_000, b"three")):
            expected[at : at + len(text)] = text
        assert os.pread(fd, MIB, 0) == expected
    # After a crash, this version leaves the journal to the one that can read it.
    kill_server(mount)
    assert mount.wait_exit() == 1
    done = qedfs("mount", tmp_path / "disk.qed", mount.mountpoint, "--no-restart", check=False)
    assert "is of another version of qedfs" in done.stderr
    installed.install(new)
    assert content(tmp_path / "disk.qed", tmp_path / "again", installed.env) == expected
