"""When a line about the progress is due, on a clock of the test's own; and what `wait` prints into a pipe."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from qedfs.cli.ui.progress_lines import ProgressLines

from ..harness.hang import HANG_SECONDS
from ..harness.mounts import qedfs
from ..harness.process import wait_for
from ..harness.starter import popen
from .support import connections, daemon

MIB = 1 << 20


def images(*populated: int | None, **more: Any) -> list[dict[str, Any]]:
    """Images of 100 MiB, of which so much is local; None for one that is not served."""
    shown = {"state": "running", "rate": 0, "eta_seconds": None, **more}
    return [{"populated": part and part * MIB, "total": part and 100 * MIB, **shown} for part in populated]


def test_a_line_for_each_tenth_and_each_ten_seconds_with_progress() -> None:
    lines = ProgressLines()
    assert lines.line(0, images(5)) is None  # where the wait begins
    assert lines.line(1, images(9)) is None
    assert lines.line(2, images(10)) == "10% local, 10.0 MiB of 100 MiB"
    assert lines.line(3, images(19)) is None
    assert lines.line(12, images(19)) == "19% local, 19.0 MiB of 100 MiB"
    assert lines.line(13, images(20, rate=MIB, eta_seconds=80)) == (
        "20% local, 20.0 MiB of 100 MiB, 1.00 MiB/s, 1m 20s left"
    )
    assert lines.line(14, images(75)) == "75% local, 75.0 MiB of 100 MiB"
    # Nothing happens over a weekend.
    assert {lines.line(at, images(75)) for at in range(15, 200_000, 1000)} == {None}


def test_new_overlays_start_the_tenths_again() -> None:
    lines = ProgressLines()
    assert lines.line(0, images(50)) is None
    assert lines.line(1, images(50, 1, None)) is None
    assert lines.line(2, images(60, 1)) == "30% local, 61.0 MiB of 200 MiB, 2 running"


def told_by(mountpoint: Path, *options: str) -> str:
    """What a wait in a pipe prints while 4 MiB come in, of which each step is at most a tenth."""
    words: list[str | Path] = ["wait", mountpoint, *options]
    with popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        wait_for(lambda: connections(mountpoint) > 0, "the waiting client")
        qedfs("stream", "start", mountpoint, "--limit", "2M")
        out, told = waiting.communicate(timeout=HANG_SECONDS)
    assert (waiting.returncode, out) == (0, "")
    return str(told)


def test_wait_prints_lines_into_a_pipe_unless_quiet(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        told = told_by(mountpoint)
        assert f"qedfs: {mountpoint}: " in told
        assert "% local, " in told
        qedfs("umount", mountpoint)


def test_a_quiet_wait_prints_nothing(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        assert told_by(mountpoint, "--quiet") == ""
        done = qedfs("wait", mountpoint, "--quiet", "--timeout", "1ms")
        assert (done.stdout, done.stderr) == ("", "")
        qedfs("umount", mountpoint)
