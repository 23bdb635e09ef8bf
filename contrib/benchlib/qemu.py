"""qemu-storage-daemon as a contender: its QED driver, its block-stream, its FUSE export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.harness.images import qemu_create
from tests.harness.process import Child, wait_for
from tests.harness.require import require

from . import bounded
from .lab import Lab, Origin
from .qmp import Qmp
from .usage import Meter
from .values import Outcome

STREAM_SECONDS = 600.0


class Daemon:
    """A running qemu-storage-daemon with a QMP socket."""

    def __init__(self, child: Child, socket: Path) -> None:
        self.pid = child.pid
        self.socket = socket
        self.wait = child.wait


@contextlib.contextmanager
def daemon(lab: Lab, *arguments: str | Path, under: Sequence[str] = ()) -> Iterator[Daemon]:
    """Starts one, as the program of the command `under` if given; it has ended when the block is left."""
    socket = lab.fresh("qsd.sock")
    argv: Sequence[str | Path] = [
        *(*under, require("qemu-storage-daemon"), "--chardev", f"socket,id=qmp,path={socket},server=on,wait=off"),
        *("--monitor", "chardev=qmp", *arguments),
    ]
    child = Child(argv, lab.fresh("qsd.log"))
    try:
        lab.prefer(child.pid)
        child.wait_until(socket.exists, "a QMP socket")
        yield Daemon(child, socket)
    finally:
        child.stop()


def blockdev(overlay: Path, node: str = "disk") -> list[str]:
    """The arguments that open a QED overlay, its backing by the name it stores."""
    return ["--blockdev", f"driver=qed,node-name={node},file.driver=file,file.filename={overlay}"]


@contextlib.contextmanager
def exported(lab: Lab, overlay: Path) -> Iterator[tuple[Daemon, Path]]:
    """An overlay as a raw file, through QEMU's FUSE export. No copy-on-read: with it, reads hang (QEMU issue 2179)."""
    image = lab.fresh("qemu.raw")
    image.touch()
    export = f"type=fuse,id=export,node-name=disk,mountpoint={image},writable=on"
    outside = image.stat().st_dev
    try:
        with daemon(lab, *blockdev(overlay), "--export", export) as running:
            wait_for(lambda: image.stat().st_dev != outside, "QEMU's FUSE export")
            yield running, image
    finally:
        bounded.detach(image)


@contextlib.contextmanager
def cold_overlay(lab: Lab, origin: Origin) -> Iterator[Path]:
    """A new, empty overlay made by QEMU; it is gone afterwards."""
    overlay = qemu_create(lab.fresh("qemu.qed"), origin.url, size=origin.size)
    lab.settle()
    origin.traffic.forget()
    try:
        yield overlay
    finally:
        overlay.unlink()


def fill(lab: Lab, origin: Origin, *, of_size: int = 0) -> Outcome:
    """block-stream of the whole of `origin`. `of_size`: the row's work, where `origin` is a smaller piece of it."""
    with cold_overlay(lab, origin) as overlay, daemon(lab, *blockdev(overlay)) as running, Qmp(running.socket) as qmp:
        meter = Meter(running.pid)
        qmp.execute("block-stream", device="disk", job_id="stream")
        qmp.wait_for_jobs(1, STREAM_SECONDS)
        seconds, figures = meter.read(origin.size)
        figures |= origin.traffic.figures(origin.size)
    return Outcome(origin.size / seconds / 1e6, figures, scaled=origin.size < of_size)
