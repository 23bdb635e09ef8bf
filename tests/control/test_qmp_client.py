"""The client of the command line against servers that fall silent: it keeps the time that it was given."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.cli.main import main
from qedfs.cli.plain import status, umount
from qedfs.control.qmp import client
from qedfs.control.qmp.client import Client, NotServed
from qedfs.errors import TimedOut
from qedfs.host.runtime import SOCKET_NAME, mount_folder
from qedfs.mount.mountpoint import MountInfo
from tests.harness.hang import HANG_SECONDS

# Hangs up on its first client, and lives on until its input ends.
_CURT = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
listener.accept()[0].close()
sys.stdin.read()
"""

SOON = 0.3


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LEAST_SECONDS", SOON)


@contextlib.contextmanager
def listening(mountpoint: Path, budget: int = 16) -> Iterator[socket.socket]:
    """A socket in the place of the mount's, which takes connections and says nothing."""
    folder = mount_folder(str(mountpoint))
    path = folder / SOCKET_NAME
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(budget)
            yield listener
    finally:
        path.unlink()
        folder.rmdir()


@contextlib.contextmanager
def curt_server(mountpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves the mount, flushes at the moment, and has hung up on its clients."""
    folder = mount_folder(str(mountpoint))
    path = folder / SOCKET_NAME
    words = [sys.executable, "-c", _CURT, str(path)]
    try:
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            yield server
    finally:
        path.unlink()
        folder.rmdir()


@contextlib.contextmanager
def answering(mountpoint: Path, *answers: object) -> Iterator[None]:
    """A server that greets, returns these answers to the first requests of a client, and is silent then."""
    with listening(mountpoint) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as requests:
                connection.sendall(b'{"QMP": {}}\r\n')
                for answer in answers:
                    request = json.JSONDecoder().raw_decode(connection.recv(65536).decode())[0]
                    connection.sendall(json.dumps({"return": answer, "id": request["id"]}).encode() + b"\r\n")
                requests.read()  # until the client hangs up

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # if no client came
            thread.join()


def run(*words: str | Path) -> int | str | None:
    """The exit code of a command that runs in this process, which stays where it is: some leave the folder."""
    with contextlib.chdir("."), pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_a_server_that_does_not_greet(tmp_path: Path) -> None:
    with listening(tmp_path), pytest.raises(TimedOut, match="no answer"):
        Client.connect(str(tmp_path), deadline=0.0)


def test_a_server_whose_queue_is_full(tmp_path: Path) -> None:
    with listening(tmp_path, budget=0), Client.reach(str(tmp_path)), pytest.raises(TimedOut, match="takes no client"):
        Client.reach(str(tmp_path), deadline=0.0)


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(NotServed):
        Client.connect(str(tmp_path))


def test_an_answer_that_does_not_come_in_time(tmp_path: Path) -> None:
    with answering(tmp_path, {}, "first"), Client.connect(str(tmp_path)) as connection:
        connection.deadline = 0.0
        assert connection.execute("query-name") == "first"  # an answer on the spot is taken all the same
        with pytest.raises(TimedOut, match="no answer"):
            connection.execute("query-name")


def test_wait_keeps_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(tmp_path, {}):
        assert run("wait", tmp_path, "--timeout", "100ms") == 7
    assert "has given no answer" in capsys.readouterr().err


def test_status_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(status, "ANSWER_SECONDS", SOON)
    with answering(tmp_path, {}):
        assert run("status", tmp_path) == 7
    assert "has given no answer" in capsys.readouterr().err


def test_umount_waits_for_the_end_of_a_server_that_hangs_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmounted = threading.Event()
    monkeypatch.setattr(
        umount, "mounted_at", lambda _: MountInfo("0:0", "fuse.qedfs", b"x")
    )  # something is mounted there
    monkeypatch.setattr(umount, "_unmount", lambda _, **__: unmounted.set())
    codes: list[int | str | None] = []
    command = threading.Thread(target=lambda: codes.append(run("umount", tmp_path)))
    with curt_server(tmp_path) as server:
        assert server.stdin is not None
        command.start()
        assert unmounted.wait(HANG_SECONDS)
        command.join(SOON)
        assert command.is_alive()
        server.stdin.close()
        command.join(HANG_SECONDS)
    assert codes == [0]


def test_umount_does_not_vouch_for_a_server_that_takes_no_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "CONNECT_SECONDS", SOON)
    monkeypatch.setattr(umount, "_unmount", lambda _, **__: None)
    with listening(tmp_path, budget=0), Client.reach(str(tmp_path)):
        assert run("umount", tmp_path) == 7
    assert "may still have the overlays open" in capsys.readouterr().err
