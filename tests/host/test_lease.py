"""Whether a file is open: for readers and writers, in this process and in another one."""

from __future__ import annotations

import errno
import fcntl
import subprocess
from pathlib import Path

import pytest

from qedfs.host import lease
from qedfs.host.lease import open_elsewhere


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_an_open_file_is_seen_and_a_closed_one_is_not(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert open_elsewhere(str(path)) is False
    with path.open(mode):
        assert open_elsewhere(str(path)) is True
    assert open_elsewhere(str(path)) is False


def test_another_process_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with path.open("rb") as file, subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[file.fileno()]) as cat:
        file.close()
        assert open_elsewhere(str(path)) is True
        cat.communicate()
    assert open_elsewhere(str(path)) is False


def test_a_file_server_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(lease, "filesystem_type", lambda fd: "nfs4")
    assert open_elsewhere(str(tmp_path / "file")) is None


def test_a_file_system_without_leases_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a mount of qedfs."""

    def refused(fd: int, command: int, kind: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").touch()
    monkeypatch.setattr(fcntl, "fcntl", refused)
    assert open_elsewhere(str(tmp_path / "file")) is None
