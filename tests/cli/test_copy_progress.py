"""The bar of an export: its line, and a real one on a terminal, where it leaves the result alone."""

from __future__ import annotations

from pathlib import Path

from qedfs.cli.ui.bars import ASCII_SIGNS, copy_line
from qedfs.cli.ui.copy_progress import CopyProgress
from qedfs.control.monitoring.progress_rate import Rate

from ..harness.mounts import qedfs
from ..harness.servers import Nginx
from ..harness.terminal import Terminal

MIB = 1 << 20


def test_the_line_of_a_copy() -> None:
    rate = Rate()
    begun = copy_line("disk.raw", 0, 4 * MIB, rate, 60, ASCII_SIGNS).plain
    assert (begun.split()[0], begun.split()[2:], set(begun.split()[1])) == ("disk.raw", ["0%"], {"-"})
    rate.note(0, 0)
    rate.note(2, 2 * MIB)
    half = copy_line("disk.raw", 2 * MIB, 4 * MIB, rate, 60, ASCII_SIGNS).plain
    assert half.endswith("  50%  1.00 MiB/s, 2s")
    assert half.count("#") in (half.count("-"), half.count("-") - 1)
    assert len(half) <= 60


def test_a_copy_counts_what_is_done() -> None:
    progress = CopyProgress("disk.raw")
    progress.add(3)
    progress.add(4)
    assert progress.done == 7


def test_an_export_draws_a_bar_on_a_terminal_and_takes_it_away(web: Nginx, overlay: Path, folder: Path) -> None:
    web.stop()  # it tries until --source-timeout is over
    with Terminal("export", overlay, folder / "disk.raw", "--with-backing") as terminal:
        terminal.wait_for(lambda grid: " 0%" in grid.text and "disk.raw" in grid.text, "bar")
        assert terminal.interrupt() == 130
        assert "%" not in terminal.grid.text
    assert not (folder / "disk.raw").exists()


def test_no_bar_in_a_pipe_and_nothing_at_all_if_quiet(overlay: Path, folder: Path) -> None:
    done = qedfs("export", overlay, folder / "a.raw", "--with-backing")
    assert (done.stderr, done.stdout.count("\n")) == ("", 1)
    done = qedfs("export", overlay, folder / "b.raw", "--with-backing", "--quiet")
    assert (done.stderr, done.stdout) == ("", "")
    with Terminal("export", overlay, folder / "c.raw", "--with-backing", "--quiet") as terminal:
        assert terminal.wait() == 0
        assert terminal.sent == 0
