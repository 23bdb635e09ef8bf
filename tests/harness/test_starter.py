"""A command from the starter is a process like any other: words, environment, folder, output, exit status."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qedfs import __version__
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import qedfs
from tests.harness.starter import needs_interpreter, program, run


def test_it_prints_and_ends_as_a_program_of_its_own(tmp_path: Path) -> None:
    for words in (["--version"], ["info", str(tmp_path / "missing.qed")], ["no-such-command"], []):
        ours = run(words, timeout_seconds=HANG_SECONDS, environ=os.environ)
        theirs = subprocess.run([sys.executable, "-m", "qedfs", *words], capture_output=True, text=True, check=False)
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_it_has_the_folder_and_the_environment_of_its_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(["info", "here.qed"], timeout_seconds=HANG_SECONDS, environ=os.environ)
    assert "here.qed" in done.stderr
    environ = {**os.environ, "_QEDFS_COMPLETE": "bash_source"}
    assert "_qedfs_completion" in run([], timeout_seconds=HANG_SECONDS, environ=environ).stdout


def test_what_only_a_new_interpreter_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not needs_interpreter(os.environ)
    assert needs_interpreter({**os.environ, "PYTHONPATH": "x"})
    assert needs_interpreter({**os.environ, "LC_ALL": "C.utf8"})
    assert not needs_interpreter({**os.environ, "HOME": "/", "NOTIFY_SOCKET": "@x"})
    # Also if a test sets it for itself, as pytest's monkeypatch does.
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    assert "import 'qedfs" in qedfs("--version").stderr


def test_a_shell_script_has_it_as_a_program(tmp_path: Path) -> None:
    text, inherited = program()
    (tmp_path / "qedfs").write_text(text)
    (tmp_path / "qedfs").chmod(0o755)
    script = 'qedfs --version; qedfs info "$PWD/missing" 2>&1; echo $?; qedfs wait . & kill $!; wait $! || echo ended'
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=environ,
        pass_fds=[inherited],
        capture_output=True,
        text=True,
        check=True,
    )
    first, error, status, last = done.stdout.splitlines()
    assert (first, status, last) == (f"qedfs, version {__version__}", "2", "ended")
    assert f"{tmp_path}/missing" in error


def test_what_does_not_end_is_killed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/disk.raw"
        with pytest.raises(subprocess.TimeoutExpired):
            run(["doctor", url], timeout_seconds=0, environ=os.environ)
    done = run(["--version"], timeout_seconds=HANG_SECONDS, environ=os.environ)
    assert done.stdout == f"qedfs, version {__version__}\n"
