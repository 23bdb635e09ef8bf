"""`qedfs wait` for a mount that is not there: over with a good end, over before its time, not there yet, or a typo."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.harness.hang import HANG_SECONDS

from ..harness.mounts import qedfs
from ..harness.process import wait_for
from ..harness.servers import Nginx
from ..harness.starter import popen
from .support import SLOW, connections, daemon

NOT_MOUNTED = 10


def wait(*words: str | Path) -> tuple[int, str]:
    """(exit code, the line on stderr)"""
    done = qedfs("wait", *words, check=False)
    assert done.stdout == ""
    assert re.fullmatch(r"(qedfs: [^\n]+\n)*", done.stderr)
    return done.returncode, done.stderr


def stream_in(source: Path, mountpoint: Path) -> None:
    """Returns when the mount is over."""
    qedfs("mount", source, mountpoint, "--until-streamed")


def test_the_good_end_is_told_by_the_overlay(overlay: Path, folder: Path, mountpoint: Path) -> None:
    stream_in(overlay, mountpoint)
    code, line = wait(mountpoint)
    assert code == NOT_MOUNTED
    assert "nothing is mounted there; if --until-streamed has ended it, --overlay OVERLAY shows" in line
    assert wait(mountpoint, "--overlay", overlay) == (0, "")
    assert wait(mountpoint, "--overlay", folder) == (0, "")
    assert wait(mountpoint, "disk", "--overlay", folder, "--for", "populated:0-1M", "--timeout", "1s") == (0, "")


def test_of_a_folder_each_has_to_be_complete_or_the_one_that_is_named(
    web: Nginx, overlay: Path, folder: Path, mountpoint: Path
) -> None:
    stream_in(overlay, mountpoint)
    other = folder / "other.qed"
    qedfs("create", other, "--backing", f"{web.url}/disk.img")
    code, line = wait(mountpoint, "--overlay", folder)
    assert code == NOT_MOUNTED
    assert line.endswith(f"nothing is mounted there, and not complete: {other}\n")
    assert wait(mountpoint, "disk.raw", "--overlay", folder) == (0, "")
    assert wait(mountpoint, "other", "--overlay", folder)[0] == NOT_MOUNTED


def test_what_names_no_overlay_is_wrong_usage(overlay: Path, folder: Path, tmp_path: Path, mountpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words in ((tmp_path / "empty",), (tmp_path / "nope.qed",)):
        assert wait(mountpoint, "--overlay", *words)[0] == 2
    assert wait(mountpoint, "nope", "--overlay", folder)[0] == 2
    (folder / "text.qed").write_text("no overlay")
    code, line = wait(mountpoint, "--overlay", folder / "text.qed")
    assert (code, "text.qed" in line) == (3, True)


def test_a_mount_that_is_there_is_asked_and_not_the_overlay(overlay: Path, mountpoint: Path) -> None:
    stream_in(overlay, mountpoint)
    other = overlay.with_name("other.qed")
    qedfs("create", other, "--backing", f"nbd://127.0.0.1:1/{overlay.name}", "--offline", "--size", "1M")
    with daemon(other, mountpoint, "--no-stream"):
        assert wait(mountpoint, "--overlay", overlay, "--timeout", "100ms")[0] == 7
        qedfs("umount", mountpoint)


def test_a_mount_that_ends_before_its_time(overlay: Path, mountpoint: Path) -> None:
    words: list[str | Path] = ["wait", mountpoint, "--overlay", overlay]
    with daemon(overlay, mountpoint, *SLOW), popen(words, stderr=subprocess.PIPE, text=True) as waiting:
        wait_for(lambda: connections(mountpoint) > 0, "the waiting client")
        qedfs("umount", mountpoint)
        _, told = waiting.communicate(timeout=HANG_SECONDS)
        assert waiting.returncode == NOT_MOUNTED
        assert told.endswith(f"the mount has ended, and not complete: {overlay}\n")


@pytest.mark.parametrize("command", [["status"], ["wait"], ["stream", "pause"], ["umount"]])
def test_a_typo_is_not_the_end_of_a_mount(tmp_path: Path, overlay: Path, mountpoint: Path, command: list[str]) -> None:
    for place, expected, text in (
        (mountpoint, NOT_MOUNTED, "nothing is mounted there"),
        (tmp_path / "mtn", 2, "there is no such folder"),
        (overlay, 2, "is not a folder"),
        (Path("/proc"), 2, "is a mount of type proc"),
    ):
        done = qedfs(*command, place, check=False)
        assert (done.returncode, done.stdout) == (expected, "")
        assert f"{place}: {text}" in done.stderr
