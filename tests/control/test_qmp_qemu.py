"""A client of QEMU's monitor: what it says of addresses at which no monitor answers."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from qedfs.control.qmp import qemu
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import Inaccessible, QedfsError, TimedOut, UsageError
from tests.harness.process import free_port, listening, wait_for
from tests.harness.require import require


def test_a_command_of_qemu_and_its_error(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    argv = [require("qemu-system-x86_64"), "-machine", "none", "-display", "none", "-nodefaults", "-S"]
    with subprocess.Popen([*argv, "-qmp", f"unix:{path},server=on,wait=off"]) as process:
        wait_for(lambda: listening(path), "a QMP socket")
        try:
            with QemuClient.at(f"unix:{path}") as client:
                assert client.execute("query-status")["running"] is False
                with pytest.raises(QedfsError, match="no-such"):
                    client.execute("no-such-command")
        finally:
            process.kill()


def test_a_monitor_behind_a_port() -> None:
    port = free_port()
    argv = [require("qemu-system-x86_64"), "-machine", "none", "-display", "none", "-nodefaults", "-S"]
    with subprocess.Popen([*argv, "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"]) as process:
        try:
            wait_for(lambda: listening(("127.0.0.1", port)), "a QMP port")
            with QemuClient.at(f"127.0.0.1:{port}") as client:
                client.execute("quit")
            process.wait()
        finally:
            process.kill()


def test_there_is_no_socket(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"QEMU at .*/none: cannot connect: No such file"):
        QemuClient.at(str(tmp_path / "none"))


def test_no_such_port() -> None:
    """65536 more than a port would be that port."""
    with pytest.raises(UsageError, match="99999 is not a port"):
        QemuClient.at("127.0.0.1:99999")


def test_nobody_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(path)
    with pytest.raises(Inaccessible, match="cannot connect: Connection refused"):
        QemuClient.at(path)
    with pytest.raises(Inaccessible, match="cannot connect: Connection refused"):
        QemuClient.at(f"127.0.0.1:{free_port()}")


def test_another_client_has_the_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "CONNECT_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(os.fspath(tmp_path / "qmp"))
        server.listen()
        with pytest.raises(TimedOut, match="one client at a time"):
            QemuClient.at(str(tmp_path / "qmp"))


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH\r\n", b"{}\r\n", b""])
def test_what_answers_speaks_no_qmp(tmp_path: Path, greeting: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(os.fspath(tmp_path / "qmp"))
        server.listen()

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(greeting)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(QedfsError, match="does not speak QMP"):
            QemuClient.at(str(tmp_path / "qmp"))
        thread.join()
