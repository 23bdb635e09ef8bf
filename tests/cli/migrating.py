"""A mount in standby and two real QEMUs, whose guest is only their firmware: what a migration with its disk needs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qedfs.cli.migration.disk_export import listen_words
from qedfs.cli.migration.handover import Handover
from qedfs.cli.migration.moved_disk import disk_meant
from qedfs.cli.migration.moved_image import MovedImage
from qedfs.cli.migration.two_qemus import TwoQemus
from qedfs.control.qmp.client import Client
from qedfs.control.qmp.qemu import QemuClient
from tests.harness.images import random_image
from tests.harness.migration.bare import Bare, bare
from tests.harness.migration.left import Left
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.require import require

MIB = 1 << 20
SIZE = 8 * MIB


def drive(path: Path) -> list[str]:
    return ["-drive", f"if=none,id=disk,file={path},format=raw,cache=none", "-device", "virtio-blk-pci,drive=disk"]


class Scene:
    """A source with its disk, a mount in standby, a destination that waits."""

    def __init__(self, folder: Path, disk: Path, overlay: Path, mount: Mount, source: Bare, destination: Bare) -> None:
        self.folder = folder
        self.disk = disk
        self.overlay = overlay
        self.mount = mount
        self.source = source
        self.destination = destination
        self.left = Left()

    def words(self, *options: str) -> list[str]:
        """Of the command line."""
        place = str(self.mount.mountpoint)
        to = ["--to", self.destination.incoming]
        return ["migrate", self.source.monitor, self.destination.monitor, place, *to, *options]

    def migrate(self, *options: str) -> tuple[int, dict[str, Any], str]:
        """`qedfs migrate --json`: the exit code, what it prints, and its remarks."""
        done = qedfs(*self.words("--json", *options), check=False)
        told = json.loads(done.stdout)
        self.left.add(told["export_pid"])
        return done.returncode, told, done.stderr

    @contextlib.contextmanager
    def handover(self, *, post_copy: bool = False) -> Iterator[tuple[Handover, Callable[[], None]]]:
        """One that has looked at everything, and serves the disk; with what moves the guest."""
        with QemuClient.at(self.source.monitor) as here, QemuClient.at(self.destination.monitor) as there:
            qemus = TwoQemus(here, there, self.destination.incoming, post_copy=post_copy)
            where = str(self.mount.mountpoint)
            image = MovedImage(lambda: Client.connect(where), None)
            running = Handover(image, disk_meant(here, None), qemus, print)
            with contextlib.closing(image), contextlib.closing(running):
                running.check()
                running.serve("", listen_words(image.backing, None))
                self.left.add(running.outcome.export_pid)
                running.try_connection()
                yield running, lambda: running.move(math.inf, lambda _: None, lambda: None)

    def source_runs(self) -> bool:
        with QemuClient.at(self.source.second_monitor) as client:
            running: bool = client.execute("query-status")["running"]
        return running

    def state(self) -> str:
        state: str = self.mount.image()["state"]
        return state


@contextlib.contextmanager
def migrating(folder: Path, size: int = SIZE, *options: str, standby: bool = True) -> Iterator[Scene]:
    """`size`: of the image. `options`: of its mount."""
    require("qemu-nbd")
    disk = random_image(folder / "source.raw", SIZE)
    overlay = folder / "disk.qed"
    known = ["--offline", "--backing-format", "raw", "--size", str(size), *(["--standby"] if standby else [])]
    qedfs("create", overlay, "--backing", f"nbd+unix:///?socket={folder / 'nbd'}", *known)
    with (
        mounted(overlay, folder / "mnt", "--allow-backing", "/", *options) as mount,
        bare(*drive(disk)) as source,
        bare(*drive(mount.path("disk.raw")), incoming="defer") as destination,
    ):
        made = Scene(folder, disk, overlay, mount, source, destination)
        try:
            yield made
        finally:
            made.left.kill()
