"""What goes wrong around a live migration: a stalled link, a killed qedfs, a server that is away. The guest writes on.

Each of these takes a guest on an emulated processor, so all are slow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qedfs.control.qmp.client import Client
from qedfs.errors import QedfsError
from tests.harness.migration import flow
from tests.harness.migration.disk import Verdict, check, foreign_blocks
from tests.harness.migration.gate import gate
from tests.harness.migration.machine import Machine
from tests.harness.migration.scene import Plan, Stage, migrate, reading, stage, uri
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import Child, Command, wait_for
from tests.harness.require import require
from tests.harness.servers import Server, qemu_nbd

pytestmark = pytest.mark.slow

READERS = 16


class Scene:
    """A guest at the source, an overlay in standby, and where its disk will be served."""

    def __init__(self, folder: Path, here: Stage) -> None:
        self.folder = folder
        self.here = here
        self.overlay = folder / "disk.qed"
        self.mountpoint = folder / "mnt"
        self.image = self.mountpoint / "disk.raw"
        self.socket = folder / "nbd"

    @contextlib.contextmanager
    def mounted(self, *options: str) -> Iterator[Mount]:
        with mounted(self.overlay, self.mountpoint, "--allow-backing", "/", *options) as mount:
            yield mount

    def verdict(self, destination: Machine) -> Verdict:
        """Ends the guest and looks at its disk, through the mount."""
        table = destination.finish()
        assert destination.rates()[-1].stale == 0
        destination.close()
        return check(self.image, self.here.plan.layout, table)


@contextlib.contextmanager
def scene(folder: Path, plan: Plan, backing: Path | None = None) -> Iterator[Scene]:
    """`backing`: the socket that the overlay names, if it is not that of the server."""
    with stage(folder, plan) as here:
        made = Scene(folder, here)
        known = ["--size", str(plan.layout.size), "--backing-format", "raw", "--offline", "--standby"]
        qedfs("create", made.overlay, "--backing", f"nbd+unix:///?socket={backing or made.socket}", *known)
        yield made


def _readers(image: Path, count: int) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for _ in range(count):
        stack.enter_context(reading(image, 128 << 10))
    return stack


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_answers_that_are_under_way_over_the_cut_over_are_not_kept(tmp_path: Path, cache: str) -> None:
    """Sixteen readers wait for answers that the source gave before its guest wrote on."""
    through = tmp_path / "gate"
    with (
        scene(tmp_path, Plan(cache=cache), through) as made,
        gate(through, made.socket) as link,
        made.mounted() as mount,
        qemu_nbd(made.here.disk) as before,
    ):
        assert isinstance(before.address, Path)
        made.socket.symlink_to(before.address)
        destination = made.here.destination(made.image)
        with _readers(made.image, READERS):
            made.here.source.wait_working(50)
            link.hold()
            made.here.source.wait_working(300)  # what is under way is old now
            flow.prepare(made.here.source, destination)
            begun = flow.begin(made.here.source, destination)
            qedfs("activate", mount.mountpoint)
            flow.switch(made.here.source, destination, begun)
            link.release()
            destination.wait_working(100)
        mount.wait()
        assert made.verdict(destination).good


def test_a_qedfs_that_is_killed_in_standby_is_in_standby_afterwards(tmp_path: Path) -> None:
    with scene(tmp_path, Plan()) as made:
        with qemu_nbd(made.here.disk) as server, made.mounted() as mount:
            assert isinstance(server.address, Path)
            made.socket.symlink_to(server.address)
            made.image.read_bytes()
            mount.kill()
        made.socket.unlink()
        made.here.source.wait_working(100)
        with made.mounted() as mount:
            assert mount.image()["state"] == "standby"
            destination = made.here.destination(made.image)
            migrate(made.here, destination, mount, made.socket)
            destination.wait_working(50)
            assert made.verdict(destination).good


@pytest.mark.parametrize("turn", range(3))
def test_a_qedfs_that_is_killed_at_the_cut_over_costs_the_guest_nothing(tmp_path: Path, turn: int) -> None:
    """The guest runs on at the source, whatever the record says; a new overlay follows it then."""
    with scene(tmp_path, Plan()) as made:
        with made.mounted() as mount, qemu_nbd(made.here.disk) as server:
            assert isinstance(server.address, Path)
            made.socket.symlink_to(server.address)
            destination = made.here.destination(made.image)
            flow.prepare(made.here.source, destination)
            flow.begin(made.here.source, destination)
            killer = threading.Timer(0.05 * turn, os.kill, (mount.pid, signal.SIGKILL))
            killer.start()
            qedfs("activate", mount.mountpoint, check=False)
            killer.join()
            made.here.source.qmp.execute("migrate_cancel")
            made.here.source.wait_working(50)
            destination.close()
            mount.kill()
        made.socket.unlink()
        made.overlay.unlink()
        known = ["--size", str(made.here.plan.layout.size), "--backing-format", "raw", "--offline", "--standby"]
        qedfs("create", made.overlay, "--backing", f"nbd+unix:///?socket={made.socket}", *known)
        with made.mounted() as mount:
            destination = made.here.destination(made.image)
            migrate(made.here, destination, mount, made.socket)
            destination.wait_working(50)
            assert made.verdict(destination).good


def test_a_qedfs_that_is_killed_while_the_disk_follows_has_what_the_guest_wrote(tmp_path: Path) -> None:
    """The guest is lost with its QEMU, as in a power cut; its file system has to recover by its journal."""
    with scene(tmp_path, Plan()) as made:
        with made.mounted("--limit", "8M") as mount:
            destination = made.here.destination(made.image)
            told = migrate(made.here, destination, mount, made.socket, "--no-wait")
            destination.wait_working(200)
            mount.kill()
        wait_for(lambda: destination.status() == "io-error", "a guest that stopped")
        destination.close()
        with made.mounted() as mount:
            mount.wait()
            os.kill(told["export_pid"], signal.SIGTERM)
            copy = tmp_path / "copy.raw"
            copy.write_bytes(made.image.read_bytes())
        # e2fsck exits with 1 if it has replayed the journal.
        argv = [require("e2fsck"), "-f", "-p", str(copy)]
        assert subprocess.run(argv, check=False, capture_output=True).returncode in (0, 1)
        assert foreign_blocks(copy, made.here.plan.layout) == 0


def _at_a_third(mount: Mount) -> None:
    wait_for(lambda: mount.image()["populated"] * 3 > mount.image()["total"], "a third of the disk")


@contextlib.contextmanager
def _following(made: Scene, *options: str) -> Iterator[tuple[Mount, Machine]]:
    """The guest has moved, and a third of its disk has followed when the server dies."""
    with made.mounted("--limit", "5M", "--source-timeout", "2s", *options) as mount:
        destination = made.here.destination(made.image)
        told = migrate(made.here, destination, mount, made.socket, "--no-wait")
        _at_a_third(mount)
        os.kill(told["export_pid"], signal.SIGKILL)
        made.socket.unlink()
        yield mount, destination


def _back(made: Scene, server: Server) -> None:
    assert isinstance(server.address, Path)
    made.socket.symlink_to(server.address)


def test_a_guest_waits_for_a_server_that_is_away(tmp_path: Path) -> None:
    with scene(tmp_path, Plan()) as made, _following(made, "--on-source-error", "wait") as (mount, destination):
        wait_for(lambda: mount.image()["stalled"] > 0, "a request that waits")
        with qemu_nbd(made.here.disk) as server:
            _back(made, server)
            destination.wait_working(100)
            mount.wait()
        assert destination.rates()[-1].errors == 0
        assert made.verdict(destination).good


def test_a_guest_is_stopped_by_the_error_of_a_server_that_is_away_and_goes_on(tmp_path: Path) -> None:
    with scene(tmp_path, Plan()) as made, _following(made, "--on-source-error", "eio") as (mount, destination):
        wait_for(lambda: destination.status() == "io-error", "a guest that stopped")
        with qemu_nbd(made.here.disk) as server:
            _back(made, server)

            def goes_on() -> bool:
                # It may meet another error before the mount has found the server again.
                if destination.status() == "io-error":
                    destination.qmp.execute("cont")
                return bool(mount.image()["state"] == "complete")

            qedfs("stream", "start", mount.mountpoint, check=False)
            wait_for(goes_on, "the disk")
            if destination.status() == "io-error":
                destination.qmp.execute("cont")
            destination.wait_working(50)
        assert destination.rates()[-1].errors == 0
        assert made.verdict(destination).good


def test_the_same_disk_at_another_address(tmp_path: Path) -> None:
    with scene(tmp_path, Plan()) as made, _following(made, "--on-source-error", "wait") as (mount, destination):
        with qemu_nbd(made.here.disk) as server:
            qedfs("source", "set", mount.mountpoint, "disk", server.url)
            destination.wait_working(100)
            mount.wait()
        assert made.verdict(destination).good


def test_a_server_that_is_gone_for_good_and_a_backup(tmp_path: Path) -> None:
    with scene(tmp_path, Plan()) as made, _following(made, "--on-source-error", "wait") as (mount, destination):
        backup = tmp_path / "backup.raw"
        backup.write_bytes(made.here.disk.read_bytes())
        qedfs("populate", mount.mountpoint, "disk", "--from", backup)
        mount.wait()
        destination.wait_working(100)
        assert made.verdict(destination).good


def test_a_cut_over_that_is_taken_back_and_repeated(tmp_path: Path) -> None:
    """The guest writes on at the source in between, so that all that was kept meanwhile is old."""
    # Slow enough that the image is not complete when the way back is taken.
    with scene(tmp_path, Plan()) as made, made.mounted("--limit", "2M") as mount:
        source = made.here.source
        with qemu_nbd(made.here.disk) as server:
            _back(made, server)
            first = made.here.destination(made.image)
            flow.prepare(source, first)
            flow.begin(source, first)
            qedfs("activate", mount.mountpoint)
            with made.image.open("rb") as file:
                file.read(16 << 20)
            source.qmp.execute("migrate_cancel")
            source.wait_working(200)
            with Client.connect(str(mount.mountpoint)) as client:
                client.execute("blockdev-set-active", node_name="disk", active=False)
            assert mount.image()["state"] == "standby"
            first.close()
            made.image.read_bytes()
            source.wait_working(100)
        made.socket.unlink()
        qedfs("stream", "limit", mount.mountpoint, "disk", "0")
        second = made.here.destination(made.image)
        migrate(made.here, second, mount, made.socket)
        second.wait_working(100)
        assert made.verdict(second).good


def test_the_first_write_of_the_guest_activates_its_disk_where_nobody_else_does(tmp_path: Path) -> None:
    """For a manager that has no hook at the right moment. Its QEMU writes nothing before, and reads pass through."""
    with scene(tmp_path, Plan()) as made, qemu_nbd(made.here.disk) as server:
        _back(made, server)
        with made.mounted("--standby-writes", "activate") as mount:
            destination = made.here.destination(made.image)
            with _readers(made.image, 2):
                flow.prepare(made.here.source, destination)
                begun = flow.begin(made.here.source, destination)
                assert mount.image()["state"] == "standby"
                flow.switch(made.here.source, destination, begun)
                destination.wait_working(100)
            mount.wait()
            assert destination.rates()[-1].errors == 0
            assert made.verdict(destination).good


@contextlib.contextmanager
def _half_there(made: Scene, mount: Mount) -> Iterator[tuple[Machine, Child]]:
    """The guest runs at the destination, which still lacks a part of its memory: `qedfs migrate --post-copy` waits."""
    source, destination = made.here.source, made.here.destination(made.image)
    # Slow before the switch, so that the guest changes memory that was sent already; after it, nothing but its faults.
    slow = {"max-bandwidth": 6 << 20, "max-postcopy-bandwidth": 4096}
    source.qmp.execute("migrate-set-parameters", **slow)
    words: list[str | Path] = [source.client_path, destination.client_path, mount.mountpoint, "--post-copy"]
    words += ["--json", "--quiet", "--listen", made.socket, "--to", uri(made.here, destination)]
    child = Command(["migrate", *map(str, words)], made.folder / "told")
    try:
        wait_for(lambda: destination.status() == "running", "the guest at the destination")
        yield destination, child
    finally:
        child.kill()


def _told(made: Scene, child: Child) -> dict[str, Any]:
    """What the command prints at its end, which is a failure."""
    assert child.wait() == 1
    text = child.output()
    told: dict[str, Any] = json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
    made.here.left.add(told["export_pid"])
    return told


def test_a_destination_that_dies_before_it_has_all_of_the_memory_costs_the_guest_and_not_its_disk(
    tmp_path: Path,
) -> None:
    with scene(tmp_path, Plan(post_copy=True)) as made, made.mounted() as mount:
        with _half_there(made, mount) as (destination, child):
            destination.close()
            told = _told(made, child)
        assert told["guest"] == "stopped"
        assert "so the guest is lost as in a power cut" in told["error"]
        with pytest.raises(QedfsError):
            made.here.source.qmp.execute("cont")
        assert made.here.source.status() != "running"
        # The old disk is served on, and the new one becomes complete.
        mount.wait()
        copy = tmp_path / "copy.raw"
        copy.write_bytes(made.image.read_bytes())
        argv = [require("e2fsck"), "-f", "-p", str(copy)]
        assert subprocess.run(argv, check=False, capture_output=True).returncode in (0, 1)
        assert foreign_blocks(copy, made.here.plan.layout) == 0


def test_a_link_that_breaks_before_all_of_the_memory_is_there_is_mended_by_hand(tmp_path: Path) -> None:
    with scene(tmp_path, Plan(post_copy=True)) as made, made.mounted() as mount:
        source = made.here.source
        with _half_there(made, mount) as (destination, child):
            destination.qmp.execute("migrate-pause")
            told = _told(made, child)
        assert told["guest"] == "destination"
        assert "the migration is postcopy-paused; QMP's migrate-recover" in told["error"]
        again = f"{uri(made.here, destination)}-again"
        destination.qmp.execute("migrate-recover", uri=again)
        source.qmp.execute("migrate-set-parameters", **{"max-postcopy-bandwidth": 0})
        source.qmp.execute("migrate", uri=again, resume=True)
        wait_for(lambda: source.qmp.execute("query-migrate")["status"] == "completed", "the rest of the memory")
        destination.wait_working(50)
        mount.wait()
        assert made.verdict(destination).good
