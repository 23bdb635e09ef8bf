"""The source's disk, served by a qemu-nbd that keeps writers away as long as it lives."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qedfs.cli.migration import disk_export
from qedfs.cli.migration.disk_export import DiskExport, listen_words
from qedfs.errors import InUse, QedfsError, UsageError
from qedfs.source.url import parse_location
from tests.harness.images import random_image
from tests.harness.process import free_port, wait_for
from tests.harness.require import require
from tests.harness.servers import qemu_nbd

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    require("qemu-nbd")
    return random_image(tmp_path / "a disk, of the guest.raw", MIB)


@pytest.fixture
def export(disk: Path, tmp_path: Path) -> Iterator[DiskExport]:
    running = DiskExport.start(str(disk), "raw", [f"--socket={tmp_path / 'nbd'}"], "disk")
    pidfd = os.pidfd_open(running.pid)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def _read(url: str) -> bytes:
    return subprocess.run([require("nbdcopy"), url, "-"], check=True, capture_output=True).stdout


def _written(path: Path) -> bool:
    """Whether QEMU's tools may write to an image."""
    argv = [require("qemu-io"), "-f", "raw", "-c", "write 0 512", str(path)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_it_serves_the_disk_to_many_clients_one_after_the_other(disk: Path, export: DiskExport, tmp_path: Path) -> None:
    url = f"nbd+unix:///disk?socket={tmp_path / 'nbd'}"
    assert _read(url) == disk.read_bytes()
    assert _read(url) == disk.read_bytes()
    export.end()
    assert subprocess.run([require("nbdinfo"), url], capture_output=True, check=False).returncode != 0


def test_only_a_guarded_disk_refuses_writers(disk: Path, export: DiskExport) -> None:
    assert _written(disk)
    export.guard()
    assert not _written(disk)
    export.end()
    assert _written(disk)


def test_the_guard_lives_as_long_as_the_server_and_not_as_the_command(disk: Path, export: DiskExport) -> None:
    export.guard()
    export.leave()
    assert not _written(disk)
    os.kill(export.pid, signal.SIGTERM)
    wait_for(lambda: _written(disk), "end of the server, and of its lock")


def test_a_disk_that_has_another_writer_is_not_guarded(disk: Path, export: DiskExport) -> None:
    with qemu_nbd(disk, writable=True) as writer:
        _read(writer.url)  # it listens before it opens the disk
        with pytest.raises(InUse, match="another program has the image open for writing"):
            export.guard()


def test_a_second_server_at_the_same_place(disk: Path, export: DiskExport, tmp_path: Path) -> None:
    port = free_port()
    first = DiskExport.start(str(disk), "raw", ["--bind=127.0.0.1", f"--port={port}"], "")
    try:
        with pytest.raises(QedfsError, match=r"does not serve .*Address already in use"):
            DiskExport.start(str(disk), "raw", ["--bind=127.0.0.1", f"--port={port}"], "")
    finally:
        first.end()


def test_a_disk_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        DiskExport.start(str(tmp_path / "none"), "raw", [f"--socket={tmp_path / 'nbd'}"], "")


def test_a_disk_in_qcow2_that_another_program_writes(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    subprocess.run([require("qemu-img"), "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    subprocess.run([require("qemu-io"), "-f", "qcow2", "-c", "write -P 7 0 1M", str(disk)], check=True)
    with qemu_nbd(disk, "qcow2", writable=True):
        running = DiskExport.start(str(disk), "qcow2", [f"--socket={tmp_path / 'nbd'}"], "")
        try:
            assert _read(f"nbd+unix:///?socket={tmp_path / 'nbd'}") == bytes([7]) * MIB
        finally:
            running.end()


@pytest.mark.parametrize(
    ("backing", "given", "words"),
    [
        ("nbd://oldhost/", None, ["--port=10809"]),
        ("nbd://oldhost:10900/disk", None, ["--port=10900"]),
        ("nbd+unix:///disk?socket=/run/nbd", None, ["--socket=/run/nbd"]),
        ("nbd://oldhost/", "10901", ["--port=10901"]),
        ("nbd://oldhost/", "192.0.2.1:10901", ["--bind=192.0.2.1", "--port=10901"]),
        ("nbd://oldhost/", "[2001:db8::1]:10901", ["--bind=2001:db8::1", "--port=10901"]),
        ("nbd://oldhost/", "/run/nbd", ["--socket=/run/nbd"]),
    ],
)
def test_where_it_listens(backing: str, given: str | None, words: list[str]) -> None:
    assert listen_words(parse_location(backing), given) == words


def test_a_server_that_was_just_started_ends_with_an_interrupted_command(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk_export._run

    def interrupted(words: Sequence[str], inherited: int) -> str | None:
        assert run(words, inherited) is None
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_export, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DiskExport.start(str(disk), "raw", [f"--socket={tmp_path / 'nbd'}"], "")
    info = [require("nbdinfo"), f"nbd+unix:///?socket={tmp_path / 'nbd'}"]
    wait_for(lambda: subprocess.run(info, capture_output=True, check=False).returncode != 0, "the end of the server")
