"""The bars of an export and of a check: the line, and a real one on a terminal, where it leaves the result alone."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from qedfs.cli.commands.check import check
from qedfs.cli.ui.bars import ASCII_SIGNS, copy_line
from qedfs.cli.ui.copy_progress import CopyProgress, drawn_by_work
from qedfs.control.monitoring.progress_rate import Rate

from ..harness.mounts import qedfs
from ..harness.servers import Nginx
from ..harness.terminal import Grid, Terminal
from ..overlay.images import many_tables

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


class Screenful(io.StringIO):
    """A terminal that remembers what a person has seen on it."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = Grid(80, 24)
        self.seen: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.grid.feed(text.replace("\n", "\r\n"))
        self.seen.append(self.grid.text)
        return len(text)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screenful:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Screenful()


def test_work_draws_a_bar_now_and_then_and_takes_it_away(screen: Screenful) -> None:
    now = 0.0
    with contextlib.redirect_stderr(screen), drawn_by_work("disk.qed", 100, lambda: now) as told:
        told(1)
        now = 0.4
        told(2)
        assert not screen.seen  # work that is soon done has no bar
        now = 1.0
        told(50)
        drawn = len(screen.seen)
        told(60)
        assert len(screen.seen) == drawn
        assert "disk.qed" in screen.grid.text
        assert " 50%" in screen.grid.text
        now = 2.0
        told(900)
        assert "100%" in screen.grid.text
    assert screen.grid.text == ""


@pytest.mark.parametrize("repair", [False, True])
def test_a_check_draws_a_bar_on_a_terminal_beside_its_json(
    repair: bool, screen: Screenful, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qedfs.cli.ui.copy_progress.REFRESH_SECONDS", 0)
    overlay = folder / "disk.qed"
    overlay.write_bytes(many_tables(4).data)
    with contextlib.redirect_stderr(screen):
        check.main([str(overlay), "--json", *(["--repair"] if repair else [])], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["data_clusters"] == 4
    assert any("disk.qed" in text and " 75%" in text for text in screen.seen)
    assert screen.grid.text == ""


def test_no_bar_in_a_pipe_and_nothing_at_all_if_quiet(overlay: Path, folder: Path) -> None:
    done = qedfs("export", overlay, folder / "a.raw", "--with-backing")
    assert (done.stderr, done.stdout.count("\n")) == ("", 1)
    done = qedfs("export", overlay, folder / "b.raw", "--with-backing", "--quiet")
    assert (done.stderr, done.stdout) == ("", "")
    with Terminal("export", overlay, folder / "c.raw", "--with-backing", "--quiet") as terminal:
        assert terminal.wait() == 0
        assert terminal.sent == 0
