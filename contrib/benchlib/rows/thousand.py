"""1,000 overlays in one mount: how long until all are served, and what they cost while nobody uses them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.harness.mounts import qedfs

from .. import ours
from ..figures import MIB
from ..lab import Lab
from ..usage import cpu_seconds, peak_mib
from ..values import QEDFS, Contenders, Outcome, Row, Target, Unit

IDLE = "idle %"
MEMORY = "memory MiB"
_SETTLE_SECONDS = 4.0  # commits and inspections after the opening come to their end
_IDLE_SECONDS = 20.0


def _mounted(lab: Lab, folder: Path) -> Outcome:
    lab.settle()
    began = time.monotonic()
    with ours.served(lab, folder) as mount:
        seconds, opening = time.monotonic() - began, cpu_seconds(mount.pid)
        time.sleep(_SETTLE_SECONDS)
        before, begun = cpu_seconds(mount.pid), time.monotonic()
        time.sleep(_IDLE_SECONDS)
        idle = (cpu_seconds(mount.pid) - before) / (time.monotonic() - begun)
        return Outcome(seconds, {IDLE: 100 * idle, MEMORY: peak_mib(mount.pid), "processor seconds": opening})


@contextlib.contextmanager
def _prepare(lab: Lab, backing: str | None, count: int) -> Iterator[Contenders]:
    folder = lab.fresh("vms")
    folder.mkdir()
    first = folder / "vm0.qed"
    try:
        if backing is None:
            qedfs("create", first, "--size", "64M")
            with ours.served(lab, first) as mount, ours.image_path(mount, first).open("r+b") as image:
                image.write(bytes(range(256)) * (4 * MIB // 256))
        else:
            qedfs("create", first, "--backing", backing, "--offline", "--size", "64M")
        for number in range(1, count):
            shutil.copyfile(first, folder / f"vm{number}.qed")
        yield {QEDFS: partial(_mounted, lab, folder)}
    finally:
        shutil.rmtree(folder)


ROWS = (
    Row(
        "thousand",
        "1,000 complete overlays in one mount, from `mount` until all are served",
        Unit.SECONDS,
        lambda lab: _prepare(lab, None, 1000),
        (Target(3), Target(0.5, figure=IDLE), Target(150, figure=MEMORY)),
        note="a flush of the disk costs most of it",
        runs=2,
    ),
    Row(
        "thousand-missing",
        "1,000 overlays of one base, nothing local, --no-stream",
        Unit.SECONDS,
        # Nobody listens there, and nothing asks.
        lambda lab: _prepare(lab, "http://127.0.0.1:9/base", 1000),
        note="no target",
        runs=2,
    ),
)
