"""What is printed to descriptor 2 while libfuse mounts is part of the error, also with --daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qedfs.mount.libfuse_words import caught_words
from tests.harness.mounts import mounted, qedfs

from .test_options import NOBODY, user


def test_words_of_this_process_and_of_its_children_are_caught(capfd: pytest.CaptureFixture[str]) -> None:
    with caught_words() as words:
        os.write(2, b"fuse: one\n")
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'fusermount3: two')"], check=True)
    assert words == ["fuse: one", "fusermount3: two"]
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_words_are_caught_from_a_block_that_fails() -> None:
    words: list[str] = []

    def fail() -> None:
        nonlocal words
        with caught_words() as words:
            os.write(2, b"why")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert words == ["why"]


def test_without_a_descriptor_they_go_where_they_went(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)
    with caught_words() as words:
        os.write(2, b"why\n")
    assert (words, capfd.readouterr().err) == ([], "why\n")


@pytest.mark.parametrize("daemon", [(), ("--daemon",)])
def test_what_fusermount3_says_is_told(tmp_path: Path, daemon: tuple[str, ...]) -> None:
    with user(NOBODY) as nobody:
        overlay, mountpoint = nobody.folder / "disk.qed", nobody.folder / "mnt"
        nobody.run("mkdir", mountpoint)
        nobody.qedfs("create", overlay, "--size", "1M")
        # It refuses before it looks at /etc/fuse.conf, where other tests may have allowed it.
        (nobody.folder / "root").mkdir()
        (nobody.folder / "root").chmod(0o1777)  # sticky, and not his
        done = nobody.qedfs("mount", overlay, nobody.folder / "root", *daemon, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "fusermount3: mountpoint " in line
    assert "not owned by user" in line


def test_our_own_log_is_not_taken_for_their_words(tmp_path: Path) -> None:
    """pyfuse3 logs what it does meanwhile."""
    qedfs("create", tmp_path / "disk.qed", "--size", "1M")
    with mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--verbose") as mount:
        lines = [line for line in mount.output().splitlines() if "Initializing pyfuse3" in line]
        assert [" DEBUG " in line and "WARNING" not in line for line in lines] == [True]
