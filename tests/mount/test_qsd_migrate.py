"""QEMU 10's handover of a disk between two storage daemons, with qedfs in the place of the destination's.

QEMU's own test of that is tests/qemu-iotests/tests/qsd-migrate. Here the destination has no daemon, but an image in
standby, whose backing is the source's daemon. What qedfs answers to `blockdev-set-active` is compared with the daemon.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qedfs.control.qmp.client import Client
from qedfs.control.qmp.qemu import QemuClient
from qedfs.errors import QedfsError
from tests.harness.images import random_image
from tests.harness.migration.bare import bare
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import Child, listening
from tests.harness.require import require, unavailable

pytestmark = pytest.mark.slow

SIZE = 10 << 20
NODE = "disk"


@contextlib.contextmanager
def daemon(folder: Path, disk: Path) -> Iterator[QemuClient]:
    """A storage daemon with a writable export for the guest, and one for qedfs; both stay when the disk is inactive."""
    argv = [
        *(require("qemu-storage-daemon"), "--blockdev", f"driver=file,node-name=file,filename={disk}"),
        *("--blockdev", f"driver=raw,file=file,node-name={NODE}"),
        *("--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd'}"),
        *("--export", f"type=nbd,id=guest,node-name={NODE},name=guest,writable=on,allow-inactive=on"),
        *("--export", f"type=nbd,id=moved,node-name={NODE},name=moved,allow-inactive=on"),
        *("--chardev", f"socket,id=qmp,path={folder / 'qsd'},server=on,wait=off", "--monitor", "chardev=qmp"),
    ]
    child = Child(argv, folder / "log")
    try:
        child.wait_until(lambda: listening(folder / "qsd"), "a QMP socket")
        with QemuClient.at(str(folder / "qsd")) as client:
            yield client
    finally:
        child.stop()


def qemu_io(client: QemuClient, command: str) -> None:
    """qemu-io on the guest's disk, with the rights of the device. QEMU prints what comes of it."""
    client.execute("human-monitor-command", command_line=f'qemu-io -d disk0/virtio-backend "{command}"')


def answers(client: Client, node: str) -> list[tuple[str, bool] | str]:
    """What it answers to every kind of request, the last of which leaves the node active."""
    said: list[tuple[str, bool] | str] = []
    for name, arguments in (
        ("known", {"node_name": node, "active": True}),
        ("known again", {"node_name": node, "active": True}),
        ("all", {"active": True}),
        ("unknown", {"node_name": "none", "active": True}),
        ("no state", {"node_name": node}),
        ("no truth", {"node_name": node, "active": "yes"}),
    ):
        try:
            returned = client.execute("blockdev-set-active", **arguments)
        except QedfsError as exc:
            said.append(f"{name}: {exc}".replace(node, "NODE"))
        else:
            said.append((name, returned == {}))
    return said


def active(client: Client, node: str) -> bool:
    nodes: list[dict[str, Any]] = client.execute("query-named-block-nodes")
    return next(bool(each["active"]) for each in nodes if each["node-name"] == node)


def has_set_active() -> bool:
    """QEMU 10 and newer."""
    done = subprocess.run(
        [require("qemu-storage-daemon"), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return int(done.split("version ")[1].split(".")[0]) >= 10


def hand_over(folder: Path, say: Callable[[str], object] = print) -> None:
    """The whole flow."""
    disk = random_image(folder / "disk.raw", SIZE)
    overlay = folder / "disk.qed"
    backing = f"nbd+unix:///moved?socket={folder / 'nbd'}"
    known = ["--size", str(SIZE), "--backing-format", "raw", "--offline", "--standby"]
    qedfs("create", overlay, "--backing", backing, *known)
    device = ["-device", f"virtio-blk-pci,drive={NODE},id=disk0"]
    there = f"driver=nbd,node-name={NODE},server.type=unix,server.path={folder / 'nbd'},export=guest"
    with (
        daemon(folder, disk) as storage,
        mounted(overlay, folder / "mnt", "--allow-backing", "/") as mount,
        Client.connect(str(mount.mountpoint)) as ours,
        bare("-blockdev", there, *device) as source,
        bare(
            *("-blockdev", f"driver=file,node-name={NODE},filename={mount.path('disk.raw')},auto-read-only=on"),
            *device,
            incoming="defer",
        ) as destination,
        QemuClient.at(source.monitor) as here,
        QemuClient.at(destination.monitor) as new,
    ):
        assert not active(ours, "disk")
        assert active(storage, NODE)
        qemu_io(here, "write -P 0x11 0 4k")
        qemu_io(new, "read 0 4k")
        ours.execute("x-qedfs-ready", device="disk")
        new.execute("migrate-incoming", uri=destination.incoming)
        here.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in ("events", "pause-before-switchover")],
        )
        here.execute("migrate", uri=destination.incoming)
        while (here.event(60) or {}).get("data", {}).get("status") != "pre-switchover":
            pass
        qemu_io(here, "flush")
        storage.execute("blockdev-set-active", active=False)
        assert not active(storage, NODE)
        ours.execute("blockdev-set-active", active=True)
        assert active(ours, "disk")
        here.execute("migrate-continue", state="pre-switchover")
        while (event := new.event(60)) is not None and event["event"] != "RESUME":
            pass
        assert event is not None
        with mount.path("disk.raw").open("rb") as file:
            assert file.read(4096) == b"\x11" * 4096
        qemu_io(new, "write -P 0x22 0 4k")
        mount.wait()
        content = disk.read_bytes()
        assert mount.path("disk.raw").read_bytes() == b"\x22" * 4096 + content[4096:]
        theirs, own = answers(storage, NODE), answers(ours, "disk")
        for one, other in zip(theirs, own, strict=True):
            say(f"QEMU: {one}\nqedfs: {other}")
        # Of a request that does not fit the schema, only that it is refused is the same.
        kinds = [[type(each) for each in said] for said in (theirs, own)]
        assert kinds[0] == kinds[1]
        assert theirs[3] == own[3]


def test_the_flow_of_qemus_own_storage_daemons(tmp_path: Path) -> None:
    if not has_set_active():
        unavailable("needs QEMU 10, for blockdev-set-active; contrib/in-debian trixie has it")
    hand_over(tmp_path)
