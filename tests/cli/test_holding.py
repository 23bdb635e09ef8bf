"""The command lines of a holder and of its servers. `tests/mount/test_holder.py` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.cli.commands.mount import mount
from qedfs.cli.holding import holder_command
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
