"""What a person sees on a terminal: the lines as they are laid out, and the real commands drawn onto a grid."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qedfs.cli.ui.bars import ASCII_SIGNS, bar_lines
from qedfs.cli.ui.layout import listed, printable, shortened, table, wrapped
from qedfs.cli.ui.screen import Screen
from qedfs.cli.ui.status_lines import fitted_lines, status_lines
from qedfs.control.qmp.client import Client
from qedfs.overlay.create import create_overlay

from ..harness.hang import HANG_OPTION
from ..harness.images import random_image
from ..harness.mounts import qedfs
from ..harness.process import free_port
from ..harness.servers import Nginx
from ..harness.terminal import Grid, Terminal
from .conftest import SIZE
from .support import SLOW, daemon

LONG = "customer-database-server-production-frankfurt-rack-17-volume-003-root"
GIB = 1 << 30


# Lines that are redrawn


class InterruptedTerminal(io.StringIO):
    """Ctrl-C comes while it is drawn on, and the kernel hands it to `thread`."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self._thread = thread
        self.interrupted = 0
        self.drawn = 0

    def write(self, text: str) -> int:
        if "50%" in text and not self.interrupted:
            self.interrupted += 1
            _interrupt(self._thread)
            self.drawn += 1
        return super().write(text)


def _interrupt(thread: int) -> None:
    """Returns when the signal is there: Python runs its handler in the main thread from now on."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        signal.pthread_kill(thread, signal.SIGINT)
        reader.recv(1)
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


@pytest.fixture
def other_thread() -> Iterator[int]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    assert thread.ident is not None
    yield thread.ident
    over.set()
    thread.join()


def test_ctrl_c_waits_for_a_drawing_whatever_thread_it_reaches(other_thread: int) -> None:
    grid, file = Grid(40, 5), InterruptedTerminal(other_thread)
    screen = Screen(Console(file=file, force_terminal=True, width=40), transient=True)
    with pytest.raises(KeyboardInterrupt), screen:
        screen.show([Text("disk.raw 50%")])
    assert (file.interrupted, file.drawn) == (1, 1)
    grid.feed(file.getvalue())
    assert grid.text.strip() == ""


# Text in cells


def test_what_would_move_the_cursor_is_shown_as_an_escape() -> None:
    assert printable("a\x1b[31m\nb\u202e\udcff") == r"a\x1b[31m\nb\u202e\udcff"
    assert printable("Größe 日本 \\n") == "Größe 日本 \\n"


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("disk.raw", 8, "disk.raw"),
        ("disk.raw", 7, "di...aw"),
        ("disk.raw", 3, "..."),
        ("disk.raw", 1, "."),
        ("日本語のイメージ", 10, "日本... ジ"),  # a cell is left over
    ],
)
def test_shortening_keeps_both_ends(text: str, width: int, short: str) -> None:
    assert shortened(text, width) == short
    assert cell_len(short) <= width


def test_wrapping_breaks_between_words_and_indents() -> None:
    assert list(wrapped("one two three", 9)) == ["one two", "  three"]
    assert list(wrapped("abcdefgh ij", 5)) == ["abcde", "  fgh", "  ij"]
    assert list(wrapped("", 5)) == [""]
    assert all(cell_len(line) <= 7 for line in wrapped("日本語のイメージ ab 日本語のイメージ", 7))


def test_a_table_that_is_too_wide_folds_or_cuts_its_first_column() -> None:
    rows = [("name", "n"), ("0123456789abcdef", "1234")]
    assert list(table(rows, "<>")) == ["name                 n", "0123456789abcdef  1234"]
    assert list(table(rows, "<>", 16)) == ["name           n", "0123456789  1234", "abcdef"]
    assert list(table(rows, "<>", 16, cut=True)) == ["name           n", "0123...def  1234"]


def test_long_lists_of_names_end_in_a_number() -> None:
    assert [listed(list("abcd")[:count]) for count in range(5)] == ["", "a", "a, b", "a, b, c", "a, b, c and 1 more"]


# Lines


def image(name: str, state: str = "running", populated: int = GIB, **more: Any) -> dict[str, Any]:
    """One image of a status."""
    image: dict[str, Any] = {
        "name": f"{name}.raw",
        "overlay": f"/srv/{name}.qed",
        "state": state,
        "populated": populated,
    }
    image |= {"served": state != "broken", "condition": [{"cause": "source"}]}
    return {**image, "total": 4 * GIB, "rate": 0, "eta_seconds": None, "error": None, "reason": None, **more}


def fleet() -> list[dict[str, Any]]:
    """Thirty images in all states."""
    source = "http://server/base.raw: cannot connect (connection refused)"
    changed = (
        "backing http://server/old.raw is not the version that this overlay was started from (ETag was 1, is now 2)"
    )
    return [
        image(LONG, rate=12 << 20, eta_seconds=200.0),
        *(image(f"dead{n}", "waiting", 0, error=source, reason=source) for n in range(5)),
        *(image(f"done{n}", "complete", 4 * GIB, eta_seconds=0.0) for n in range(9)),
        image("held", "paused", reason="by the user"),
        image("idle", "off", 0),
        image("old", "source-changed", error=changed),
        image("text", "broken", 0, total=0, error="/srv/text.qed: not a QED image"),
        *(image(f"vm{n}", rate=10 << 20, eta_seconds=100.0 + n) for n in range(10)),
        image("日本語", "failed", 0, error="http://server/x.raw has no such file (404)"),
    ]


def status(*images: dict[str, Any]) -> dict[str, Any]:
    return {"mountpoint": "/mnt", "images": list(images)}


SUMMARY = [
    "30 images: 9 complete, 11 running, 5 waiting, 1 paused, 1 off, 1 failed, 1",
    "  source-changed, 1 broken; 49.0 GiB of 116 GiB local",
]


def test_the_whole_status_on_a_terminal() -> None:
    lines = status_lines(status(*fleet()), 80)
    assert max(map(cell_len, lines)) <= 80
    assert lines[0].split() == ["image", "state", "local", "of", "pace", "left"]
    assert f"{LONG}.raw" in "".join(line.split()[0] for line in lines[1:6])
    # One source that is away is one trouble, whoever needs it; a path that the name says already is not repeated.
    assert (
        "dead0.raw, dead1.raw, dead2.raw and 2 more: http://server/base.raw: cannot\n"
        "  connect (connection refused)\n"
        "held.raw: paused (by the user)\n"
    ) in "\n".join(lines)
    assert "text.raw: not a QED image" in lines
    assert lines[-2:] == SUMMARY


def test_columns_line_up_whatever_the_names_are_written_in() -> None:
    lines = status_lines(status(*fleet()))[:31]
    ends = {cell_len(line.split("GiB" if "GiB" in line else "0 B")[0]) for line in lines if "complete" in line}
    assert len(ends) == 1
    states = {cell_len(line[: line.index(word)]) for line in lines[1:] for word in line.split()[1:2]}
    assert len(states) == 1


def test_without_a_terminal_each_image_and_each_trouble_is_one_line() -> None:
    lines = status_lines(status(*fleet()))
    assert len(lines) == 1 + 30 + 5 + 1
    assert [line for line in lines if line != line.rstrip()] == []
    assert any(line.startswith(f"{LONG}.raw  running") for line in lines)


def test_a_mount_that_has_got_another_server_says_why() -> None:
    last = {"reason": "SIGKILL", "pause_seconds": 0.514}
    found = {**status(*fleet()), "restarts": 1, "last_restart": last}
    line = "its server was replaced once, the last one after SIGKILL, in 0.51 s"
    assert line in status_lines(found)
    assert line in fitted_lines(found, 200, 50)
    assert "its server was replaced 3 times" in "".join(status_lines({**found, "restarts": 3}))


def test_one_image_needs_no_summary() -> None:
    assert len(status_lines(status(image("disk")), 80)) == 2
    assert status_lines(status(), 80) == ["/mnt: no overlays there"]


@pytest.mark.parametrize(("width", "height"), [(80, 23), (200, 49), (80, 9), (100, 12)])
def test_watched_lines_fit_the_terminal(width: int, height: int) -> None:
    lines = fitted_lines(status(*fleet()), width, height)
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    assert lines[0].startswith("30 images: 9 complete")
    # What streams is shown before what is done.
    assert any("running" in line for line in lines[2:])
    if height < 30:
        assert any(re.fullmatch(r"and \d+ more", line) for line in lines)
        assert not any(line.startswith("done") for line in lines)
    else:
        assert sum(line.startswith("done") for line in lines) == 9


def bars(images: list[dict[str, Any]], width: int = 80, height: int = 23) -> list[str]:
    return [line.plain for line in bar_lines(images, width, height, ASCII_SIGNS)]


@pytest.mark.parametrize(("width", "height"), [(80, 23), (200, 49), (60, 9)])
def test_bars_fit_the_terminal(width: int, height: int) -> None:
    lines = bars(fleet(), width, height)
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    drawn = [line for line in lines if "%" in line]
    assert drawn[0].startswith("all ")
    assert len({cell_len(line[: line.index("%")]) for line in drawn}) == 1
    assert len({cell_len(line[: re.search(r"[#-]{4}", line).start()]) for line in drawn}) == 1  # type: ignore[union-attr]


def test_a_bar_tells_how_much_how_fast_and_how_long() -> None:
    lines = bars([image("disk", rate=10 << 20, eta_seconds=307.2)], width=60)
    assert lines == ["disk.raw ######-------------------  25%  10.0 MiB/s, 5m 07s"]
    complete = ["disk.raw ######################### 100%  complete"]
    assert bars([image("disk", "complete", 4 * GIB)], width=60) == complete
    assert bars([image("disk", "complete", 0, total=0)], width=60) == complete
    assert bars([]) == ["no overlays yet"]


def test_bars_say_why_an_image_waits() -> None:
    assert bars([image("disk", "waiting", reason="starts in 20s")])[1] == "disk.raw: waiting (starts in 20s)"


# The real commands


@pytest.fixture
def thirty(web: Nginx, folder: Path) -> Path:
    """A folder of thirty overlays, some of which have a trouble."""
    for number in range(24):
        backing = f"{web.url}/disk.img?{number}"
        create_overlay(str(folder / f"vm{number:02}.qed"), image_size=SIZE, backing=backing)
    create_overlay(str(folder / f"{LONG}.qed"), image_size=SIZE, backing=f"{web.url}/disk.img")
    create_overlay(str(folder / "esc\x1b[31m\n.qed"), image_size=SIZE, backing=f"{web.url}/disk.img")
    create_overlay(str(folder / "dead.qed"), image_size=GIB, backing=f"http://127.0.0.1:{free_port()}/x")
    create_overlay(str(folder / "gone.qed"), image_size=GIB, backing=f"{web.url}/nope.img")
    create_overlay(str(folder / "local.qed"), image_size=GIB, backing="/srv/base.raw")
    (folder / "text.qed").write_text("no overlay")
    os.rename(folder / "vm00.qed", os.fsencode(folder) + b"/\xff.qed")
    return folder


def test_bars_of_one_image(overlay: Path, mountpoint: Path) -> None:
    with Terminal("mount", overlay, mountpoint, "--limit", "1M") as terminal:
        bar = re.compile(r"\ndisk\.raw ━*╸?─+ +\d+%  [\d.]+ [KM]iB/s, \d+s$")
        terminal.wait_for(lambda grid: bar.search(grid.text) is not None, "bar with its pace")
        assert terminal.grid.text.startswith("qedfs: serving")
        assert terminal.interrupt() == 0
        assert "%" not in terminal.grid.text


def test_bars_of_thirty_images_on_24_lines(thirty: Path, mountpoint: Path) -> None:
    with Terminal("mount", thirty, mountpoint, "--source-timeout", "300ms", *SLOW) as terminal:
        # Until all of it is there: what is read from a terminal may end in the middle of a screen.
        terminal.wait_for(shows_bars_of_thirty, "bars of thirty images")
        # What cannot be served scrolls by above, and names the overlay.
        assert f"qedfs: not served: {thirty}/local.qed:" in terminal.grid.text.replace("\n", "")
        assert terminal.interrupt() == 0


def shows_bars_of_thirty(grid: Grid) -> bool:
    """A summary, bars with names that are cut and escaped, how many there is no room for, and troubles."""
    rows = grid.rows
    top = next((at for at, row in enumerate(rows) if row.startswith("30 images: ")), len(rows))
    return (
        "cannot connect" in "".join(rows)
        and len(rows[top:]) >= 10
        and all(row.startswith(("30 images", "  ")) or "%" in row for row in rows[top : top + 10])
        and any(re.fullmatch(r"and \d+ more", row) for row in rows)
        and any(re.match(r"customer-dat\.\.\.03-root\.raw [━╸─]", row) for row in rows)
        and any(row.startswith(r"\udcff.raw ") or r"esc\x1b[31m\n.raw" in row for row in rows)
    )


def test_nothing_is_sent_while_nothing_changes(overlay: Path, mountpoint: Path) -> None:
    with Terminal("mount", overlay, mountpoint, "--no-stream") as terminal:
        terminal.wait_for(lambda grid: "0%  off" in grid.text, "bar")
        assert terminal.watch(1.2) == 0


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), pytest.param(200, 50, marks=pytest.mark.slow)])
def test_watching_thirty_images(thirty: Path, mountpoint: Path, columns: int, lines: int) -> None:
    with daemon(thirty, mountpoint, "--source-timeout", "300ms", *SLOW):
        watch = Terminal("status", mountpoint, "--watch", columns=columns, lines=lines)
        with watch as terminal:
            terminal.wait_for(lambda grid: "vm09.raw" in grid.text, "table")
            assert terminal.grid.scrolled == []
            assert terminal.grid.rows[0].startswith("30 images: ")
            sent_per_second = terminal.watch(2.0)
            assert terminal.grid.scrolled == []
            # Each second the grid once, with what little it takes to get there.
            assert sent_per_second < 2 * columns * lines
            assert terminal.interrupt() == 130
        printed = qedfs("status", mountpoint).stdout
        # On a busy machine the source may have been silent for longer than this mount lets it.
        assert re.search(r"^\\udcff\.raw +(running|complete|waiting|failed) ", printed, re.MULTILINE)
        assert "\x1b" not in printed
        qedfs("umount", mountpoint)


def test_waiting_shows_what_it_waits_for_and_leaves_nothing(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with Terminal("wait", mountpoint, "--timeout", HANG_OPTION) as terminal:
            terminal.wait_for(lambda grid: "0%  off" in grid.text, "bar")
            qedfs("stream", "start", mountpoint)
            assert terminal.wait() == 0
            assert terminal.grid.text == ""
        qedfs("umount", mountpoint)


def test_a_changed_source_is_named_once(web: Nginx, disk: Path, overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with (mountpoint / "disk.raw").open("rb") as file:
            file.read(65536)
        qedfs("umount", mountpoint)
    random_image(disk, SIZE, seed=1)
    os.utime(disk, (1, 1))
    with daemon(overlay, mountpoint):
        done = qedfs("wait", mountpoint, check=False)
        assert done.stderr.startswith(f"qedfs: disk.raw: backing {web.url}/disk.img is not the version")
        qedfs("umount", mountpoint)


# Errors


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["mount", "a", "b", "--metrcs", "3"],
            "No such option '--metrcs'. Did you mean '--metrics'? (see qedfs mount --help)",
        ),
        (["mount", "a"], "Missing argument 'MOUNTPOINT' (see qedfs mount --help)"),
        (
            ["mount", "a", "b", "--stream-delay", "x"],
            "Invalid value for '--stream-delay': 'x' is not a duration; write it like 30s, 10m or 2h "
            "(see qedfs mount --help)",
        ),
        (
            ["mount", "a", "b", "-o", "stream_between=25-3"],
            "Invalid value for '--stream-between': '25-3' is not a time window; write it like 22:00-06:00 "
            "(see qedfs mount --help)",
        ),
        (["nonsense"], "there is no command nonsense; qedfs --help lists them"),
        (["info", "a\x1b[31m.qed"], r"a\x1b[31m.qed: No such file or directory"),
    ],
)
def test_usage_errors_are_one_line_too(tmp_path: Path, words: list[str], line: str) -> None:
    done = qedfs(*words, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"qedfs: {line}\n")


def test_no_command_at_all_shows_the_help() -> None:
    done = qedfs(check=False)
    assert "Usage: qedfs [OPTIONS] COMMAND" in done.stdout + done.stderr


def test_a_broken_overlay_that_is_named_is_an_error_of_its_own(folder: Path, mountpoint: Path) -> None:
    (folder / "text.qed").write_text("no overlay")
    with daemon(folder, mountpoint):
        for words in (["stream", "start"], ["stream", "step"], ["wait"]):
            done = qedfs(*words, mountpoint, "text", check=False)
            reason = "text.raw: not a QED image: the file is shorter than a header"
            assert (done.returncode, done.stderr) == (3, f"qedfs: {reason}\n")
        qedfs("umount", mountpoint)


def test_names_do_not_need_the_terminals_encoding(folder: Path) -> None:
    path = folder / "日本.qed"
    create_overlay(str(path), image_size=1 << 20, backing=None)
    done = qedfs("info", path, env={"PYTHONIOENCODING": "latin-1:strict"})
    assert r"\u65e5\u672c.qed" in done.stdout


def test_a_signal_says_nothing_of_python(overlay: Path, mountpoint: Path) -> None:
    with daemon(overlay, mountpoint, "--no-stream"):
        with Client.connect(str(mountpoint)), Terminal("wait", mountpoint) as terminal:
            terminal.wait_for(lambda grid: "off" in grid.text, "bar")
            assert terminal.interrupt() == 130
            assert terminal.grid.text == ""
        qedfs("umount", mountpoint)
