"""Ctrl-C before a command runs, while it runs, and after it: exit code 130 and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.harness.mounts import qedfs

# Runs qedfs in a process that gets SIGINT as soon as it loads a module.
LOADING = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

{before}
from qedfs.cli.entry import main
sys.meta_path.insert(0, Interrupt())
sys.argv = ["qedfs", {word!r}]
main()
"""
# The same, as the last action of the process, when the interpreter is being taken down.
ENDING = """
import atexit, os, signal, sys
from qedfs.cli.entry import main
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["qedfs", "help"]
main()
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["click", "qedfs.cli.main", "qedfs.errors"])
def test_ctrl_c_while_the_modules_are_loaded(module: str) -> None:
    done = run(LOADING.format(module=module, before="", word="help"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_at_the_end_of_a_command() -> None:
    done = run(ENDING)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_caller_that_ignores_sigint_keeps_it_ignored() -> None:
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    done = run(LOADING.format(module="click", before=ignored, word="help"))
    assert (done.returncode, done.stderr) == (0, "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (["help"], "Usage: qedfs [OPTIONS] COMMAND"),
        (["help", "mount"], "Usage: qedfs mount [OPTIONS]"),
        (["help", "stream", "step"], "Usage: qedfs stream step [OPTIONS]"),
        (["version"], "qedfs, version "),
        (["-V"], "qedfs, version "),
    ],
)
def test_what_people_type_who_look_for_help(words: list[str], begins: str) -> None:
    assert qedfs(*words).stdout.startswith(begins)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("statsu", "there is no command statsu; did you mean status?"),
        ("mouny", "there is no command mouny; did you mean mount or umount?"),
        ("zzz", "there is no command zzz; qedfs --help lists them"),
    ],
)
def test_a_mistyped_command(word: str, hint: str) -> None:
    done = qedfs(word, "mnt", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"qedfs: {hint}\n")
