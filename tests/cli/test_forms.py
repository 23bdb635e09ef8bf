"""Which command lines need no click, and that they mean what click takes them for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qedfs import __version__
from qedfs.cli.plain.forms import COMPLETING, plain_call
from tests.harness.hang import HANG_SECONDS

from .support import plain, with_click


@pytest.mark.parametrize(
    "words",
    [
        [],
        [""],
        ["mount", "a", "b"],
        ["status", "--json"],
        ["status", "a", "b"],
        ["status", ""],
        ["wait", "a", "--quiet"],
        ["wait", "a", "b", "c"],
        ["umount"],
        ["umount", "a", "b"],
        ["umount", "-h"],
        ["--version", "a"],
        ["help"],
    ],
)
def test_everything_else_is_left_to_click(words: list[str]) -> None:
    assert plain_call(words) is None


def test_a_shell_that_completes_gets_click(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain_call(["status"]) is not None
    monkeypatch.setenv(COMPLETING, "bash_complete")
    assert plain_call(["status"]) is None


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["version"]])
def test_the_version(words: list[str]) -> None:
    assert plain(*words) == with_click(*words) == (0, f"qedfs, version {__version__}\n", "")


@pytest.mark.parametrize("command", ["status", "wait", "umount"])
def test_failures_are_told_as_click_would(command: str, tmp_path: Path) -> None:
    code, out, text = plain(command, tmp_path)
    assert (code, out, text) == with_click(command, tmp_path)
    assert code == 10
    assert text.startswith(f"qedfs: {tmp_path}: nothing is mounted there")


def test_nothing_of_click_is_loaded(tmp_path: Path) -> None:
    """It takes as long to load as Python takes to start."""
    program = "import os, sys; from qedfs.cli.entry import main; os._exit = sys.exit\n"
    program += "try:\n    main()\nfinally:\n    print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    for words in (["--version"], ["status", tmp_path], ["wait", tmp_path], ["umount", tmp_path]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
        )
        loaded = set(done.stdout.split())
        assert "qedfs" in loaded
        assert loaded & {"click", "dataclasses", "inspect", "hashlib", "trio", "subprocess"} == set(), words


def test_what_is_printed_arrives_although_the_interpreter_is_not_taken_down() -> None:
    """In a pipe, where Python writes at its end by itself."""
    program = "import atexit, sys; from qedfs.cli.entry import main; atexit.register(print, 'taken down'); main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    assert done.stdout == f"qedfs, version {__version__}\n"
