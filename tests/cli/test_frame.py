"""What is around every command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness.hang import HANG_SECONDS

PROGRAM = """
import sys
from qedfs.cli.frame import run_framed
from qedfs.errors import NotMounted
def fail(): raise NotMounted("gone")
def leave(): raise SystemExit(7)
def say(): print("a\\udcff")
def ctrl_c(): raise KeyboardInterrupt
run_framed({"fail": fail, "leave": leave, "say": say, "ctrl_c": ctrl_c}[sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("fail", (10, "", "qedfs: gone\n")),
        ("leave", (7, "", "")),
        ("say", (0, "a\\udcff\n", "")),
        ("ctrl_c", (130, "", "")),
    ],
)
def test_the_exit_status_and_what_is_printed(command: str, result: tuple[int, str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == result


def test_closed_standard_streams_are_opened() -> None:
    shell = f'exec "{sys.executable}" -c "$1" say <&- >&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", PROGRAM], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
