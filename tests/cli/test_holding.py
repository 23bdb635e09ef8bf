"""The command lines of a holder and of its servers. `tests/mount/test_holder.py` runs them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest

from qedfs.cli.commands.mount import mount
from qedfs.cli.holding import hold, holder_command
from qedfs.cli.server_command import server_command


def test_a_holder_knows_what_to_start_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qedfs.cli.holding.mount_folder", lambda _: tmp_path / "home")
    arguments = ["--limit=5", "--", "a.qed", "mnt"]
    words = holder_command(arguments, str(tmp_path), log="text", most_deaths=5, first_pid=8, first_fd=7)
    at = words.index("--")
    assert words[at + 1 :] == server_command("--limit=5", "--", "a.qed", "mnt")
    assert words[3].endswith("/qedfs/mount/holder.py")
    assert {f"--mountpoint={tmp_path}", f"--folder={tmp_path}/home", "--first-pid=8", "--first-fd=7"} <= set(words[:at])


def test_what_is_passed_on_between_these_processes_is_no_option_for_people() -> None:
    hidden = {option.name for option in mount.params if getattr(option, "hidden", False)}
    assert {"ready_fd", "holder_fd", "most_deaths"} <= hidden


def test_where_there_is_no_room_for_a_second_process_the_mount_has_no_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qedfs.cli.holding.mount_folder", lambda _: tmp_path)
    monkeypatch.setattr(os, "fork", Mock(side_effect=BlockingIOError))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert hold([], str(tmp_path), log="text", most_deaths=5) is None
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_the_holder_keeps_what_the_server_does_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process would become it. Its signals wait until it heeds them."""
    monkeypatch.setattr("qedfs.cli.holding.mount_folder", lambda _: tmp_path)
    monkeypatch.setattr(os, "fork", lambda: 4711)
    pipe, end = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    found: list[list[str]] = []

    def become(_: str, words: list[str], __: dict[str, str]) -> None:
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        found.append(words)
        raise InterruptedError

    monkeypatch.setattr(os, "execve", become)
    try:
        with pytest.raises(InterruptedError):
            hold([], str(tmp_path), log="text", most_deaths=5, closed=[end])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert "--first-pid=4711" in found[0]
    assert os.read(pipe, 1) == b""
    os.close(pipe)
