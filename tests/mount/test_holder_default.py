"""Mounts as a user makes them, without an option: each outlives its server, in the foreground and as a daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qedfs.cli.takeovers import Unanswered, lasting_client
from tests.cli.support import daemon, in_mount_table, is_running, server_pid
from tests.harness.images import qemu_check, qemu_same
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for

from .outlives import kill_server, servers, wait_for_takeover, wait_until_serving
from .support import MIB, Origin, assert_same, create, mounted_over, opened, origin

# Put in the way of every server. In the file that the environment names stands what its server does.
FAULTS = """
import os, sys
if os.environ.get("QEDFS_FAULT") and "mount" in sys.orig_argv:
    import trio
    from qedfs.mount import held, memory
    held.ORPHAN_SECONDS = 0.2
    async def fault(_):
        while True:
            await trio.sleep(0.02)
            try:
                with open(os.environ["QEDFS_FAULT"]) as file:
                    kind = file.read()
                os.unlink(os.environ["QEDFS_FAULT"])
            except OSError:
                continue
            if kind == "raise":
                raise KeyError("a bug")
            while kind == "spin":
                pass
    memory.give_back_memory = fault
"""


@contextlib.contextmanager
def over(folder: Path, *options: str) -> Iterator[tuple[Mount, Origin]]:
    """A mount as `qedfs mount` makes it, and its source."""
    with origin(folder, 2 * MIB) as source, mounted_over(folder, source.url, "--restart", *options) as mount:
        wait_until_serving(mount)
        yield mount, source


@contextlib.contextmanager
def faulty(folder: Path) -> Iterator[tuple[Mount, Path]]:
    """A mount, and the file that makes its server fail."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(FAULTS)
    env = {"PYTHONPATH": str(folder / "site"), "QEDFS_FAULT": str(folder / "fault")}
    with origin(folder, MIB) as source:
        overlay = create(folder / "disk.qed", source.url)
        with mounted(overlay, folder / "mnt", "--restart", "--no-stream", env=env) as mount:
            wait_until_serving(mount)
            yield mount, folder / "fault"


def put(fault: Path, kind: str) -> None:
    """Tells the server what to do, at once: it might read a file that is still empty."""
    fault.with_suffix(".new").write_text(kind)
    fault.with_suffix(".new").rename(fault)


def test_a_daemon_outlives_its_server_and_commands_wait_for_the_next_one(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with origin(tmp_path, MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with daemon(overlay, mountpoint, "--no-stream", "--restart"):
            with opened(mountpoint / "disk.raw") as fd:
                os.pwrite(fd, b"before", 0)
                os.kill(server_pid(mountpoint), signal.SIGKILL)
                status = json.loads(qedfs("status", mountpoint, "--json").stdout)
                os.pwrite(fd, b"after", 100)
            assert status["restarts"] == 1
            assert status["restart"] == {"after_crash": True, "upgrade": True, "error": None}
            assert status["last_restart"]["counts"] == {"killed": 1}
            os.kill(server_pid(mountpoint), signal.SIGKILL)
            listed = json.loads(qedfs("list", "--json").stdout)["mounts"]
            assert {one["state"] for one in listed if one["mountpoint"] == str(mountpoint)} <= {"served", "restarting"}
            qedfs("stream", "start", mountpoint)
            qedfs("wait", mountpoint, "--timeout", "60s")
            pid = server_pid(mountpoint)
            qedfs("umount", mountpoint)
            assert not is_running(pid)
            assert not in_mount_table(mountpoint)


def test_ctrl_c_ends_the_mount_in_order(tmp_path: Path) -> None:
    """The terminal sends it to the whole process group."""
    with over(tmp_path, "--no-stream") as (mount, _):
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"written", 0)
        (server,) = servers(mount.pid)
        assert os.getpgid(server) == server  # so it has it from the holder only, once
        os.kill(mount.pid, signal.SIGINT)
        assert mount.wait_exit() == 0
        assert not in_mount_table(mount.mountpoint)


def test_a_mount_until_streamed_ends_by_itself_although_its_server_was_killed(tmp_path: Path) -> None:
    with over(tmp_path, "--until-streamed", "--limit", "512K") as (mount, source):
        kill_server(mount)
        wait_for_takeover(mount, 1)
        qedfs("stream", "limit", mount.mountpoint, "disk.raw", "0")
        assert mount.wait_exit() == 0
        assert qemu_check(tmp_path / "disk.qed").corruptions == 0  # a kill may leave leaks, nothing else
        assert qemu_same(tmp_path / "disk.qed", source.raw)


def test_a_request_that_dies_with_its_server_is_answered_by_the_next_one_or_said_to_be_unknown(tmp_path: Path) -> None:
    with over(tmp_path, "--no-stream") as (mount, _), lasting_client(str(mount.mountpoint)) as client:

        def broken_off(command: str, **arguments: object) -> object:
            (server,) = servers(mount.pid)
            os.kill(server, signal.SIGSTOP)  # so that it does not answer
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(client.execute, command, device="disk", **arguments)
                os.kill(server, signal.SIGKILL)
                return answer.result()

        broken_off("block_resize", size=3 * MIB)
        wait_for_takeover(mount, 1)
        assert mount.image()["size"] == 3 * MIB
        with pytest.raises(Unanswered, match="another one serves the mount on"):
            broken_off("x-qedfs-snapshot", file=str(tmp_path / "snap"))
        wait_for_takeover(mount, 2)
        assert mount.path("disk.raw").stat().st_size == 3 * MIB


def test_a_read_only_mount_outlives_its_server(tmp_path: Path) -> None:
    with over(tmp_path, "--read-only") as (mount, source), opened(mount.path("disk.raw"), os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 0) == source.data()[:100]
        kill_server(mount)
        assert os.pread(fd, 100, MIB) == source.data()[MIB : MIB + 100]
        wait_for_takeover(mount, 1)
        assert mount.image()["opens"] == 1


def test_an_internal_error_of_the_server_is_no_end_of_the_mount(tmp_path: Path) -> None:
    with faulty(tmp_path) as (mount, fault), opened(mount.path("disk.raw")) as fd:
        os.pwrite(fd, b"before", 0)
        put(fault, "raise")
        wait_for_takeover(mount, 1)
        assert os.pread(fd, 6, 0) == b"before"
        os.pwrite(fd, b"after", 100)
        status = mount.status()
        assert status["last_restart"]["reason"] == "exit code 1 (internal error: KeyError: 'a bug')"
        assert status["last_restart"]["counts"] == {"error": 1}
    assert mount.returncode == 0


def test_a_server_that_spins_ends_after_its_holder(tmp_path: Path) -> None:
    with faulty(tmp_path) as (mount, fault):
        (server,) = servers(mount.pid)
        put(fault, "spin")
        wait_for(lambda: not fault.exists(), "a server that spins")
        os.kill(mount.pid, signal.SIGKILL)
        wait_for(lambda: not is_running(server), "its end")
        assert "in fault" in mount.output()  # where it was


def test_a_holder_that_is_killed_while_nobody_serves_leaves_no_dead_mount(tmp_path: Path) -> None:
    with over(tmp_path, "--no-stream") as (mount, source):
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"written", 0)
        before = servers(mount.pid)
        kill_server(mount)
        wait_for(lambda: servers(mount.pid) not in ([], before), "the next server")
        os.kill(mount.pid, signal.SIGKILL)
        wait_for(lambda: not in_mount_table(mount.mountpoint), "the end of the mount")
        wait_for(lambda: "the holder of the mount was killed" in mount.output(), "what it says")
        model = tmp_path / "model"
        model.write_bytes(b"written" + source.data()[7:])
        with mounted(tmp_path / "disk.qed", tmp_path / "again") as again:
            assert_same(again.path("disk.raw"), model)


def test_restarts_cost_no_descriptors(tmp_path: Path) -> None:
    def count(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    with over(tmp_path, "--no-stream") as (mount, _):
        for number in range(3):
            kill_server(mount)
            wait_for_takeover(mount, number + 1)
            pid = server_pid(mount.mountpoint)
            if number == 0:
                of_holder, of_server = count(mount.pid), count(pid)
            assert count(mount.pid) == of_holder
            wait_for(lambda: count(pid) <= of_server, "the same number of descriptors")  # noqa: B023
