"""What a holder does to the machine: real processes, that are no servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from qedfs.mount.holder_machine import Machine, Server, watchdog_seconds

# A program that gets the socket as `--holder-fd=N` and runs one line.
LINE = "import os, socket, sys, time; s = socket.socket(fileno=int(sys.argv[2].split('=')[1])); "
LINE += "state = s.recv(1000); "


def machine_of(line: str, **options: str) -> Machine:
    """A machine whose servers run this line of Python."""
    return Machine(
        {"log": "text", "mountpoint": "/mnt", **options}, [sys.executable, "-I", "-S", "-c", LINE + line, "mount"]
    )


class Told:
    """What happens, in words."""

    def __init__(self, machine: Machine) -> None:
        self.said: list[str] = []
        self.machine = machine

    def signalled(self, number: int) -> None:
        self.said.append(f"signal {number}")

    def heard(self, server: Server, verb: str, rest: str, fd: int | None) -> None:
        self.said.append(f"{verb}:{rest}")
        if fd is not None:
            self.said[-1] += f" {os.readlink(f'/proc/self/fd/{fd}')} {os.get_inheritable(fd)}"
            os.close(fd)

    def ended(self, server: Server, code: int) -> None:
        self.said.append(f"ended {code}")

    def until(self, word: str) -> list[str]:
        while not any(said.startswith(word) for said in self.said):
            self.machine.wait(0.01, self)
        return self.said


def test_the_last_words_of_a_server_come_before_its_end() -> None:
    machine = machine_of("s.send(b'set a b c'); s.send(b'failed it has no more to say'); sys.exit(3)")
    machine.start("7")
    assert Told(machine).until("ended") == ["set:a b c", "failed:it has no more to say", "ended 3"]


def test_a_server_hears_the_format_of_the_values_before_all_else() -> None:
    machine = machine_of("s.send(b'heard ' + state)")
    machine.start("7")
    assert Told(machine).until("ended")[0] == "heard:state 7"


def test_a_descriptor_arrives_and_is_not_inherited() -> None:
    machine = machine_of("socket.send_fds(s, [b'keep'], [os.memfd_create('mount')])")
    machine.start("7")
    assert Told(machine).until("ended")[0] == "keep: /memfd:mount (deleted) False"


def test_what_a_server_could_not_send_is_read_from_its_memory_at_its_end() -> None:
    machine = machine_of(
        "m = os.memfd_create('unsent'); socket.send_fds(s, [b'ready'], [m]); s.send(b'set a 1');"
        "os.write(m, b'set a 2\\nset b x y\\ndel c\\nset a 3 that was cu'); os.kill(os.getpid(), 9)"
    )
    before = len(os.listdir("/proc/self/fd"))
    machine.start("")
    said = Told(machine).until("ended")
    assert said == ["ready:", "set:a 1", "set:a 2", "set:b x y", "del:c", "ended -9"]
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # those that wake the machine up


def test_a_server_gets_the_mount_with_what_was_said() -> None:
    machine = machine_of(
        "b, f, *_ = socket.recv_fds(s, 1000, 2); os.lseek(f[1], 0, 0);"
        "s.send(b'got ' + b + b' ' + os.read(f[1], 1000) + b' ' + os.readlink(f'/proc/self/fd/{f[0]}').encode())"
    )
    server = machine.start("7")
    fd = os.memfd_create("mount")
    machine.pass_on(server, fd, {"reason": "SIGKILL"}, {"name": "\udcff"})
    os.close(fd)
    said = Told(machine).until("ended")[0]
    assert (
        said
        == f"got:take {json.dumps({'reason': 'SIGKILL'})} {json.dumps({'name': chr(0xDCFF)})} /memfd:mount (deleted)"
    )


def test_a_server_gets_the_mount_after_the_python_of_its_holder_was_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade of the machine leaves a running holder with the modules that it has loaded."""
    machine = machine_of(
        "b, f, *_ = socket.recv_fds(s, 9999, 2); os.lseek(f[1], 0, 0); s.send(b'got ' + os.read(f[1], 9999) + b) "
    )
    server = machine.start("7")
    told = {"reason": "SIGKILL", "restarts": 2, "kinds": {"killed": 2}, "since": 1000.0625}
    values = {"opens/é€😀": 'a"b\\c\td\udcff', "plain": "1 2", "": ""}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        for name in [name for name in sys.modules if name.partition(".")[0] == "json"]:
            patch.delitem(sys.modules, name)
        fd = os.memfd_create("mount")
        machine.pass_on(server, fd, told, values)
        os.close(fd)
    (said,) = [said.removeprefix("got:") for said in Told(machine).until("ended") if said.startswith("got:")]
    passed, _, taken = said.partition("}take ")
    assert (json.loads(f"{passed}}}"), json.loads(taken)) == (values, told)


def test_a_killed_server_has_ended_by_the_signal_and_hears_nothing_more() -> None:
    machine = machine_of("time.sleep(1000)")
    server = machine.start("7")
    machine.kill(server, signal.SIGKILL)
    told = Told(machine)
    assert told.until("ended") == ["ended -9"]
    machine.kill(server, signal.SIGTERM)
    machine.send(server, "hand")


def test_servers_have_a_process_group_and_the_usual_signals() -> None:
    machine = machine_of("s.send(f'group {os.getpgid(0) == os.getpid()}'.encode())")
    machine.start("7")
    assert Told(machine).until("ended")[0] == "group:True"


def test_what_cannot_be_started_leaves_no_descriptor() -> None:
    machine = Machine({}, ["/none", "mount"])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        machine.start("7")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_server_of_which_a_thread_is_left_is_told_from_one_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({}, [])
    files = {
        "/proc/7/stat": "7 (python) Z 1",
        "/proc/7/task/8/wchan": "do_epoll_wait",
        "/proc/7/task/9/wchan": "request_wait_answer",
    }
    monkeypatch.setattr("qedfs.mount.holder_machine._read", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "listdir", lambda _: ["7", "8", "9"])
    server = Server.__new__(Server)
    server.pid = 7
    assert machine.lingers_for(server) == "mount"
    files["/proc/7/task/9/wchan"] = "blk_flush"
    assert machine.lingers_for(server) == "disk"
    files.update({"/proc/7/task/8/wchan": "0", "/proc/7/task/9/wchan": ""})
    assert machine.lingers_for(server) == "unknown"
    files["/proc/7/stat"] = "7 (python) S 1"
    assert machine.lingers_for(server) == ""


@pytest.mark.parametrize(
    ("kind", "beginning"),
    [("json", '{"time": '), ("journal", "<4>WARNING it"), ("text", "20")],
)
def test_its_lines_look_like_those_of_the_servers(kind: str, beginning: str, capfd: pytest.CaptureFixture[str]) -> None:
    machine_of("", log=kind).log("it was killed", "warning")
    line = capfd.readouterr().err
    assert line.startswith(beginning)
    assert "it was killed" in line
    assert line.count("\n") == 1


def test_what_is_mounted_in_its_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device number tells."""
    monkeypatch.setattr(os, "posix_spawnp", lambda *_: pytest.fail("unmounts another file system"))
    machine_of("", mountpoint="/proc").take_away(os.memfd_create("mount"), "0:99999")
    machine_of("", mountpoint="/none").take_away(os.memfd_create("mount"), "0:99999")


def test_the_time_of_the_watchdog_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    assert watchdog_seconds() == 20
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_seconds() is None
    assert "WATCHDOG_USEC" not in os.environ
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert watchdog_seconds() is None


def test_messages_for_the_service_manager_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        Machine.notify("WATCHDOG=1")
        assert manager.recv(100) == b"WATCHDOG=1"
    Machine.notify("to nobody")
