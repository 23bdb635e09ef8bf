"""Whatever a caller has closed or filled up: commands do what they should, and end with the code that they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..harness.hang import HANG_OPTION
from ..harness.images import first_difference
from ..harness.mounts import COMMAND_SECONDS, qedfs
from ..harness.require import require_fuse
from .support import QEDFS, daemon, in_mount_table, is_running, server_pid

ENTRY = Path(sys.executable).with_name("qedfs")


def run(redirections: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """A command as a shell starts it with these redirections."""
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *QEDFS, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)


ONE_CLOSED = [pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "<&-", "2>&-")]
MANY = [">&- 2>&- <&-", "2>/dev/full"]


@pytest.mark.parametrize("redirections", [*ONE_CLOSED, *MANY])
def test_a_daemon_starts_with_streams_closed_or_full(
    overlay: Path, disk: Path, folder: Path, mountpoint: Path, redirections: str
) -> None:
    require_fuse()
    (folder / "bad.qed").write_text("no overlay")  # for a remark
    try:
        done = run(redirections, "mount", folder, mountpoint, "--daemon")
        assert (done.returncode, done.stdout) == (0, "")
        assert "Traceback" not in done.stderr
        assert first_difference(mountpoint / "disk.raw", disk) is None
        pid = server_pid(mountpoint)
        assert run(redirections, "umount", mountpoint).returncode == 0
        assert not is_running(pid)
    finally:
        if in_mount_table(mountpoint):
            subprocess.run(["umount", "--lazy", mountpoint], check=False)


@pytest.mark.parametrize("redirections", [ONE_CLOSED[0], *MANY])
def test_commands_end_with_their_own_code(
    overlay: Path, folder: Path, mountpoint: Path, tmp_path: Path, redirections: str
) -> None:
    (tmp_path / "text.qed").write_text("no overlay")
    with daemon(folder, mountpoint):
        for code, *words in (
            (0, "status", mountpoint),
            (0, "status", mountpoint, "--json"),
            (0, "wait", mountpoint, "--timeout", HANG_OPTION),
            (3, "info", tmp_path / "text.qed"),
            (10, "status", tmp_path),
            (2, "umount"),
            (0, "create", tmp_path / f"new-{len(redirections)}.qed", "--size", "1M"),
        ):
            done = run(redirections, *words)
            assert done.returncode == code, (words, done)
            assert "Traceback" not in done.stderr, words


def test_a_foreground_mount_serves_with_streams_closed(overlay: Path, disk: Path, mountpoint: Path) -> None:
    """What libfuse says goes to descriptor 2, which must not be its own /dev/fuse by then."""
    command = [
        "sh",
        "-c",
        'exec "$@" >&- 2>&- <&-',
        "sh",
        *QEDFS,
        "mount",
        "--until-streamed",
        str(overlay),
        str(mountpoint),
    ]
    assert subprocess.run(command, timeout=COMMAND_SECONDS, check=False).returncode == 0
    assert not in_mount_table(mountpoint)
    assert "the overlay is complete" in qedfs("info", overlay).stdout


# What runs in the daemon.


def test_a_daemon_runs_nothing_of_the_folder_that_its_caller_stands_in(
    overlay: Path, mountpoint: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("secrets.py", "queue.py", "sitecustomize.py"):
        (shared / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'x')\nraise SystemExit('planted')\n")
    try:
        done = subprocess.run(
            [ENTRY, "mount", "--daemon", overlay, mountpoint],
            cwd=shared,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert not (tmp_path / "ran").exists()
        qedfs("umount", mountpoint)
    finally:
        if in_mount_table(mountpoint):
            subprocess.run(["umount", "--lazy", mountpoint], check=False)


def test_a_daemon_finds_modules_where_its_caller_does_but_for_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qedfs.cli.server_command import environment

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/usr/bin", *sys.path[1:]])
    monkeypatch.setenv("PYTHONPATH", ":/opt/lib::lib:")
    assert environment()["PYTHONPATH"] == f"/opt/lib:{tmp_path}/lib"
    monkeypatch.setenv("PYTHONPATH", ":")
    assert "PYTHONPATH" not in environment()
    checkout = str(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "path", [checkout, *sys.path[1:]])
    assert environment()["PYTHONPATH"] == checkout


def test_a_result_that_cannot_be_written_is_a_failure_of_one_line(overlay: Path) -> None:
    done = run(">/dev/full", "info", overlay)
    assert (done.returncode, done.stderr) == (1, "qedfs: No space left on device\n")
