"""A whole live migration: a guest that writes all the time, its disk, the link between two "hosts", and the verdict.

`follow` moves the guest with `qedfs migrate`, or without a standby, to see what goes wrong then. `mirror` moves the
disk first, as QEMU does it by itself (blockdev-mirror to an NBD export of the destination), for comparison.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness.images import sparse_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import free_port
from tests.harness.require import require
from tests.harness.servers import Server, link_to, qemu_nbd

from . import flow
from .disk import SMALL, Layout, Verdict, check, make_disk
from .left import Left
from .machine import Machine, Rate, machine

READ_PAUSE_SECONDS = 0.002  # between two reads of somebody who reads all the time


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is different from one migration to the next."""

    layout: Layout = SMALL
    standby: bool = True
    source_format: str = "raw"  # or qcow2; the destination's disk is raw
    post_copy: bool = False
    cache: str = "none"
    blockdev: bool = False  # -blockdev with auto-read-only instead of -drive
    reader: bool = False  # somebody reads the destination's file all the time
    rtt_ms: float | None = None  # a link of 1 Gbit/s between the hosts, else loopback
    pause_us: int = 500  # between two writes of the guest
    writes_before: int = 50
    writes_after: int = 100
    rate_seconds: float = 0  # for how long the guest's rate is measured before and after
    qemu: str | None = None


@dataclasses.dataclass
class Report:
    """What came of it. Times in seconds since the migration began; sizes in bytes."""

    verdict: Verdict
    down_ms: float
    memory_free: float
    disk_free: float
    sent: dict[str, int]  # over the link, by what for
    before: float = 0  # the guest's reads and writes per second
    during: float = 0
    after: float = 0


def drive(path: Path, plan: Plan, image_format: str = "raw") -> list[str]:
    """QEMU's arguments for the guest's disk."""
    # Without a standby qedfs often notices that the source has changed. The guest is to meet that error, not to wait.
    on_error = "rerror=stop,werror=stop" if plan.standby else "rerror=report,werror=report"
    if not plan.blockdev:
        return ["-drive", f"if=virtio,file={path},format={image_format},cache={plan.cache},{on_error}"]
    direct = "on" if plan.cache == "none" else "off"
    return [
        *("-blockdev", f"driver=file,node-name=file,filename={path},auto-read-only=on,cache.direct={direct}"),
        *("-blockdev", f"driver={image_format},node-name=disk,file=file,cache.direct={direct}"),
        *("-device", f"virtio-blk-pci,drive=disk,{on_error}"),
    ]


class Stage:
    """A guest that runs at the source, and what a migration of it needs."""

    def __init__(self, folder: Path, plan: Plan, source: Machine, disk: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.plan = plan
        self.source = source
        self.disk = disk
        self._stack = stack
        self._links: dict[str, Server] = {}
        self.left = Left()
        stack.callback(self.left.kill)

    def url(self, name: str, address: Path | tuple[str, int]) -> str:
        """The NBD address of a server at `address`, over the link if there is one."""
        if self.plan.rtt_ms is None and isinstance(address, Path):
            return f"nbd+unix:///?socket={address}"
        return f"nbd://{self.place(name, address)}/"

    def place(self, name: str, address: Path | tuple[str, int]) -> str:
        """HOST:PORT for `address`, over the link if there is one. `name`: what crosses it."""
        if self.plan.rtt_ms is None:
            assert not isinstance(address, Path)
            return "{}:{}".format(*address)
        link = link_to(address, rtt_ms=self.plan.rtt_ms, up_mbit=1000)
        self._links[name] = self._stack.enter_context(link)
        return "{}:{}".format(*self._links[name].address)  # type: ignore[misc]

    def destination(self, path: Path) -> Machine:
        """A QEMU that waits for the guest."""
        plan = self.plan
        there = machine(drive(path, plan), layout=plan.layout, incoming=True, pause_us=plan.pause_us, qemu=plan.qemu)
        return self._stack.enter_context(there)

    def sent(self) -> dict[str, int]:
        """Bytes that crossed the link, both ways; the links end here."""
        found = {}
        for name, link in self._links.items():
            link.stop()
            words = re.search(r"bytes: (\d+) up, (\d+) down", link.output())
            found[name] = int(words[1]) + int(words[2]) if words else 0
        return found


@contextlib.contextmanager
def stage(folder: Path, plan: Plan) -> Iterator[Stage]:
    """A guest that has begun to write."""
    disk = make_disk(folder / "source.raw", plan.layout)
    if plan.source_format != "raw":
        image = folder / f"source.{plan.source_format}"
        convert = [require("qemu-img"), "convert", "-f", "raw", "-O", plan.source_format, str(disk), str(image)]
        subprocess.run(convert, check=True)
        disk = image
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(
            machine(drive(disk, plan, plan.source_format), layout=plan.layout, pause_us=plan.pause_us, qemu=plan.qemu)
        )
        source.wait_working(plan.writes_before)
        time.sleep(plan.rate_seconds)
        yield Stage(folder, plan, source, disk, stack)


def follow(folder: Path, plan: Plan) -> Report:
    """The guest moves first and its disk follows."""
    with stage(folder, plan) as here, contextlib.ExitStack() as stack:
        overlay = folder / "disk.qed"
        socket = folder / "nbd"
        if not plan.standby:
            socket = stack.enter_context(qemu_nbd(here.disk)).address  # type: ignore[assignment]
        size = ["--size", str(plan.layout.size), "--backing-format", "raw", "--offline"]
        standby = ["--standby"] if plan.standby else []
        qedfs("create", overlay, "--backing", here.url("disk", socket), *size, *standby)
        options = ["--allow-backing", "/"] if plan.rtt_ms is None else []
        mount = stack.enter_context(mounted(overlay, folder / "mnt", *options))
        image = mount.path("disk.raw")
        if plan.reader:
            stack.enter_context(reading(image))
        destination = here.destination(image)
        if plan.standby:
            found = migrate(here, destination, mount, socket)
        else:
            found = _without_standby(here, destination)
        until = time.monotonic()
        report = _finish(here, destination, image, found["stopped_seconds"] * 1000, until)
        report.memory_free, report.disk_free = found["memory_free_seconds"], found["disk_complete_seconds"]
        return report


def migrate(here: Stage, destination: Machine, mount: Mount, socket: Path, *options: str) -> dict[str, Any]:
    """`qedfs migrate`; returns what it prints. `socket`: where the source's disk is served."""
    words: list[str | Path] = [here.source.client_path, destination.client_path, mount.mountpoint, "--json"]
    words += ["--listen", socket, "--to", uri(here, destination), *options]
    if here.plan.post_copy:
        words.append("--post-copy")
    done = qedfs("migrate", *words)
    print(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    here.left.add(found["export_pid"])
    return found


def uri(here: Stage, destination: Machine) -> str:
    """Where the memory goes."""
    if here.plan.rtt_ms is None:
        return f"unix:{destination.qmp_path.with_name('migration')}"
    port = free_port()
    destination.qmp.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
    return f"tcp:{here.place('memory', ('127.0.0.1', port))}"


def _without_standby(here: Stage, destination: Machine) -> dict[str, float]:
    flow.prepare(here.source, destination, postcopy=here.plan.post_copy)
    begun = flow.begin(here.source, destination, postcopy=here.plan.post_copy)
    times = flow.switch(here.source, destination, begun)
    return {
        "stopped_seconds": times.down_ms / 1000,
        "memory_free_seconds": times.completed - begun,
        "disk_complete_seconds": 0,
    }


def mirror(folder: Path, plan: Plan) -> Report:
    """QEMU's own way: the disk first, by blockdev-mirror, then the guest."""
    with stage(folder, plan) as here:
        source = here.source
        image = sparse_image(folder / "destination.raw", plan.layout.size)
        destination = here.destination(image)
        node = next(device for device in destination.qmp.execute("query-block") if device.get("inserted"))["inserted"]
        port = free_port()
        listen = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
        destination.qmp.execute("nbd-server-start", addr=listen)
        export = {"type": "nbd", "id": "export", "node_name": node["node-name"], "writable": True, "name": ""}
        destination.qmp.execute("block-export-add", **export)
        host, there = here.place("disk", ("127.0.0.1", port)).split(":")
        began = time.monotonic()
        server = {"type": "inet", "host": host, "port": there}
        source.qmp.execute("blockdev-add", driver="nbd", node_name="target", server=server, export="")
        disk = next(device for device in source.qmp.execute("query-block") if device.get("inserted"))
        source.qmp.execute(
            "blockdev-mirror",
            job_id="mirror",
            device=disk["inserted"]["node-name"],
            target="target",
            sync="full",
        )
        flow.await_event(source, lambda event: event["event"] == "BLOCK_JOB_READY")
        flow.prepare(source, destination, postcopy=plan.post_copy)
        address = "" if plan.rtt_ms is None else uri(here, destination)
        begun = flow.begin(source, destination, postcopy=plan.post_copy, uri=address)
        source.qmp.execute("block-job-cancel", device="mirror")
        flow.await_event(source, lambda event: event["event"] == "BLOCK_JOB_COMPLETED")
        times = flow.switch(source, destination, begun)
        destination.qmp.execute("nbd-server-stop")
        until = time.monotonic()
        report = _finish(here, destination, image, times.down_ms, until, began)
        report.memory_free = report.disk_free = until - began
        return report


def _finish(
    here: Stage, destination: Machine, image: Path, down_ms: float, until: float, began: float | None = None
) -> Report:
    """Lets the guest write on, ends it, and looks at its disk. `until`: when the migration was over."""
    destination.wait_working(here.plan.writes_after)
    time.sleep(here.plan.rate_seconds)
    table = destination.finish()
    destination.close()
    verdict = check(image, here.plan.layout, table)
    assert destination.said("STALE") is None or verdict.stale or not here.plan.standby, destination.said("STALE")
    after = destination.rates()
    report = Report(verdict, down_ms, 0, 0, here.sent())
    first = here.source.rates()
    report.before = rate([line for line in first if began is None or line.seconds < began])
    moving = [line for line in first if began is not None and line.seconds >= began]
    report.during = rate(moving) if moving else rate([line for line in after if line.seconds <= until])
    report.after = rate([line for line in after if line.seconds > until])
    return report


def rate(lines: list[Rate]) -> float:
    """Reads and writes per second over these lines."""
    if len(lines) < 2:
        return 0.0
    first, last = lines[0], lines[-1]
    return (last.writes + last.reads - first.writes - first.reads) / max(last.seconds - first.seconds, 1e-9)


@contextlib.contextmanager
def reading(path: Path, size: int = 64 << 10) -> Iterator[None]:
    """Somebody reads a file all the time, through the kernel's pages. Errors are no matter: the file may be away."""
    ended = threading.Event()

    def read() -> None:
        for turn in itertools.count():
            if ended.wait(READ_PAUSE_SECONDS):
                return
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                end = file.seek(0, 2)
                # All of it, in an order that the kernel's read-ahead does not guess.
                file.seek(turn * 37 % max(1, end // size) * size)
                file.read(size)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
