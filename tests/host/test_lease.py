"""Whether a file is open: for readers and writers, in this process and in another one."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.host import lease
from qedfs.host.lease import open_elsewhere, open_for_writing


@pytest.fixture(params=["disk", "tmpfs"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file on one kind of file system or the other."""
    path = tmp_path / "file" if request.param == "disk" else Path("/dev/shm", f"qedfs-{random.randrange(1 << 60):x}")
    path.write_bytes(b"content")
    yield path
    path.unlink()


def writer_of(path: Path) -> bool | None:
    """What `open_for_writing` says of a file that we have open for reading."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return open_for_writing(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_an_open_file_is_seen_and_a_closed_one_is_not(path: Path, mode: str) -> None:
    assert open_elsewhere(str(path)) is False
    with path.open(mode):
        assert open_elsewhere(str(path)) is True
    assert open_elsewhere(str(path)) is False


def test_another_process_is_seen(path: Path) -> None:
    with path.open("rb") as file, subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[file.fileno()]) as cat:
        file.close()
        assert open_elsewhere(str(path)) is True
        cat.communicate()
    assert open_elsewhere(str(path)) is False


def test_a_writer_is_seen_and_a_reader_is_none(path: Path) -> None:
    assert writer_of(path) is False
    with path.open("rb"):
        assert writer_of(path) is False
    with path.open("ab"):
        assert writer_of(path) is True
    assert writer_of(path) is False


def test_who_opens_the_file_during_the_lease_does_not_end_us(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells the holder of a lease by a signal; the default one ends a process that does not expect it."""
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in (signal.SIGIO, signal.SIGURG)
    }
    real = fcntl.fcntl

    def interrupted(fd: int, command: int, argument: int = 0) -> int:
        result = real(fd, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
            with pytest.raises(BlockingIOError):
                os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        return result

    monkeypatch.setattr(fcntl, "fcntl", interrupted)
    try:
        assert writer_of(path) is False
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert signals == [signal.SIGURG]
    with path.open("ab"):
        assert writer_of(path) is True


def test_a_file_server_is_not_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "filesystem_type", lambda fd: "nfs4")
    with path.open("ab"):
        assert open_elsewhere(str(path)) is None
        assert writer_of(path) is None


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
def test_a_file_that_has_no_leases_or_not_for_us_cannot_tell(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file system such as a mount of qedfs has none, and only the owner may ask for one."""

    def refused(fd: int, command: int, kind: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refused)
    assert open_elsewhere(str(path)) is None
    assert writer_of(path) is None
