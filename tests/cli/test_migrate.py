"""`qedfs migrate` on a real mount and two real QEMUs: exit codes, what it prints, and what is left when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import QedfsError
from tests.documents.blocks import ROOT, commands_tried_by
from tests.harness.hang import HANG_OPTION
from tests.harness.images import first_difference, random_image
from tests.harness.migration.bare import bare
from tests.harness.mounts import qedfs
from tests.harness.process import QEDFS, Command, free_port, wait_for
from tests.harness.require import require, require_fuse

from .migrating import SIZE, Scene, drive, migrating


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with migrating(tmp_path) as made:
        yield made


@pytest.mark.parametrize("post_copy", [False, True], ids=["pre-copy", "post-copy"])
def test_the_guest_moves_at_once_and_its_disk_follows(scene: Scene, post_copy: bool) -> None:
    code, told, remarks = scene.migrate(*(["--post-copy"] if post_copy else []))
    assert code == 0, remarks
    assert told["guest"] == "destination"
    assert told["export_pid"] is None
    assert told["error"] is None
    assert 0 < told["stopped_seconds"] <= told["switch_seconds"] <= told["memory_free_seconds"]
    assert scene.source.wait() == 0
    with QemuClient.at(scene.destination.monitor) as client:
        assert client.execute("query-status")["running"]
    assert scene.state() == "complete"
    assert first_difference(scene.mount.path("disk.raw"), scene.disk) is None
    # The server is gone, and with it the lock.
    subprocess.run([require("qemu-io"), "-f", "raw", "-c", "write 0 512", scene.disk], check=True)


def test_the_disk_is_served_on_without_this_command_and_nobody_may_write_to_it(scene: Scene) -> None:
    code, told, remarks = scene.migrate("--no-wait")
    assert code == 0, remarks
    assert f"process {told['export_pid']} still serves the source's disk" in remarks
    write = [require("qemu-io"), "-f", "raw", "-c", "write 0 512", str(scene.disk)]
    done = subprocess.run(write, capture_output=True, text=True, check=False)
    assert 'Failed to get "write" lock' in done.stderr
    scene.mount.wait()


def test_a_command_that_is_interrupted_while_the_disk_follows_leaves_the_server(scene: Scene) -> None:
    qedfs("stream", "pause", scene.mount.mountpoint)  # so that it surely follows later
    log = scene.folder / "log"
    child = Command(scene.words("--json"), log)
    try:
        wait_for(lambda: "the source's QEMU has ended" in child.output() or child.returncode is not None, "the move")
        os.kill(child.pid, signal.SIGINT)
        child.wait()
    finally:
        child.kill()
    qedfs("stream", "resume", scene.mount.mountpoint)
    scene.mount.wait()
    if "still serves" in child.output():  # else the disk was complete before the signal came
        scene.left.add(int(child.output().split("process ")[1].split()[0]))


def test_memory_that_takes_too_long(scene: Scene) -> None:
    with QemuClient.at(scene.source.second_monitor) as client:
        client.execute("migrate-set-parameters", max_bandwidth=4096)
    code, told, _ = scene.migrate("--timeout", "1ms")  # QEMU 10 sends empty memory in no time
    assert code == 7
    assert told["guest"] == "source"
    assert told["export_pid"] is None
    assert scene.source_runs()
    assert scene.state() == "standby"


# SIGHUP: its terminal, or the connection of ssh, has ended.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_command_that_is_interrupted_while_the_memory_moves(scene: Scene, number: signal.Signals) -> None:
    with QemuClient.at(scene.source.second_monitor) as client:
        client.execute("migrate-set-parameters", max_bandwidth=4096)
    child = Command(scene.words(), scene.folder / "log")
    try:
        wait_for(lambda: "memory moves" in child.output(), "the move")
        os.kill(child.pid, number)
        assert child.wait() == 130
    finally:
        child.kill()
    assert scene.source_runs()
    assert scene.state() == "standby"


def test_an_image_that_is_not_in_standby(tmp_path: Path) -> None:
    with migrating(tmp_path, standby=False) as scene:
        code, told, remarks = scene.migrate()
        assert code == 2
        assert "disk.raw: is not in standby, but running; see mount --standby" in remarks
        assert told["guest"] == "source"


def test_an_image_of_another_size(tmp_path: Path) -> None:
    with migrating(tmp_path, 2 * SIZE) as scene:
        code, _, remarks = scene.migrate()
        assert code == 2
        assert f"disk.raw: has {2 * SIZE} bytes, but disk has {SIZE}" in remarks


def test_a_destination_with_another_disk(scene: Scene) -> None:
    other = random_image(scene.folder / "other.raw", SIZE)
    with bare(*drive(other), incoming="defer") as destination:
        scene.destination = destination
        code, _, remarks = scene.migrate()
    assert code == 2
    assert "has no disk on the image disk.raw" in remarks


def test_a_source_disk_that_is_served_by_something_else(scene: Scene) -> None:
    argv = [require("qemu-nbd"), "-r", "-f", "raw", "-t", "-e", "0", "-k", str(scene.folder / "nbd"), str(scene.disk)]
    with subprocess.Popen(argv) as server:
        try:
            wait_for((scene.folder / "nbd").exists, "a server")
            code, told, remarks = scene.migrate("--no-export")
            assert code == 0, remarks
            assert told["export_pid"] is None
            assert scene.state() == "complete"
            assert server.poll() is None
        finally:
            server.terminate()


def test_a_mount_of_another_host_is_named_by_its_control_socket(scene: Scene) -> None:
    socket = scene.mount.status()["socket"]
    words = [socket if word == str(scene.mount.mountpoint) else word for word in scene.words("--quiet")]
    assert qedfs(*words).stderr == ""
    assert scene.state() == "complete"


# The new host is this one: commands run here, and what is forwarded is there already or gets another name.
SSH = """#!/bin/sh
case $1 in
-f) shift 2
    while [ "$1" = -L ]; do from=${2%%:*} to=${2#*:}; [ "$from" = "$to" ] || ln -s "$to" "$from"; shift 2; done ;;
*) shift; exec "$@" ;;
esac
"""


def test_the_guide_moves_a_running_machine_as_it_says(tmp_path: Path) -> None:
    new_host, old_host = commands_tried_by("tests/cli/test_migrate.py")
    disk = random_image(tmp_path / "old.raw", SIZE)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("ssh", SSH), ("qedfs", f'#!/bin/sh\nexec {" ".join(QEDFS)} "$@"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    nbd, memory = free_port(), free_port()
    places = {"nbd://oldhost/": f"nbd://127.0.0.1:{nbd}/", "newhost:4444": f"127.0.0.1:{memory}"}
    places |= {"-m 2G": "-m 64M", "--size 20G": f"--size {SIZE}"}

    def run(commands: str) -> None:
        for name, here in places.items():
            commands = commands.replace(name, here)
        words = [require("bash"), "-euo", "pipefail", "-c", commands]
        done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"

    require_fuse()
    old = ["-m 64M", "-display none", "-daemonize", "-qmp unix:old.qmp,server=on,wait=off"]
    try:
        run(f"qemu-system-x86_64 {' '.join(old)} -drive file={disk},format=raw,if=virtio,cache=none")
        run(new_host)
        run(old_host)
        with QemuClient.at(str(tmp_path / "new.qmp")) as client:
            assert client.execute("query-status")["running"]
        assert first_difference(tmp_path / "mnt/disk.raw", disk) is None
    finally:
        for monitor in ("old.qmp", "new.qmp"):
            with contextlib.suppress(QedfsError), QemuClient.at(str(tmp_path / monitor)) as client:
                client.execute("quit")
        qedfs("umount", tmp_path / "mnt", "--wait", HANG_OPTION, check=False)
