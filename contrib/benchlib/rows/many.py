"""Twenty overlays of one base, all streaming at once from 20 ms away: what the link, the clock and the memory see."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.harness.images import qemu_create

from .. import ours, qemu
from ..figures import MIB, PEAK, WIRE
from ..lab import Lab, Origin
from ..qmp import Qmp
from ..usage import Meter
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_COUNT = 20
_RTT_MS = 20
_ONE = "one overlay"


def _ours(lab: Lab, origin: Origin, count: int) -> Outcome:
    folder = lab.fresh("vms")
    folder.mkdir()
    try:
        for number in range(count):
            ours.create(folder / f"vm{number}.qed", origin.url)
        lab.settle()
        origin.traffic.forget()
        with ours.served(lab, folder) as mount, Qmp(Path(mount.status()["socket"])) as qmp:
            meter = Meter(mount.pid)
            for number in range(count):
                qmp.execute("block-stream", device=f"vm{number}")
            qmp.wait_for_jobs(count, ours.STREAM_SECONDS)
            seconds, figures = meter.read(origin.size * count)
        return Outcome(seconds, figures | origin.traffic.figures(origin.size))
    finally:
        shutil.rmtree(folder)


def _qemu(lab: Lab, origin: Origin, count: int) -> Outcome:
    overlays = [qemu_create(lab.fresh("vm.qed"), origin.url, size=origin.size) for _ in range(count)]
    try:
        lab.settle()
        origin.traffic.forget()
        nodes = [word for number, path in enumerate(overlays) for word in qemu.blockdev(path, f"vm{number}")]
        with qemu.daemon(lab, *nodes) as running, Qmp(running.socket) as qmp:
            meter = Meter(running.pid)
            for number in range(count):
                qmp.execute("block-stream", device=f"vm{number}", job_id=f"stream{number}")
            qmp.wait_for_jobs(count, qemu.STREAM_SECONDS)
            seconds, figures = meter.read(origin.size * count)
        return Outcome(seconds, figures | origin.traffic.figures(origin.size))
    finally:
        for path in overlays:
            path.unlink()


@contextlib.contextmanager
def _prepare(lab: Lab) -> Iterator[Contenders]:
    with lab.origin("http", lab.pick(512 * MIB, 128 * MIB), _RTT_MS) as origin:
        yield {
            QEDFS: partial(_ours, lab, origin, _COUNT),
            _ONE: partial(_ours, lab, origin, 1),
            QEMU: partial(_qemu, lab, origin, _COUNT),
        }


ROWS = (
    Row(
        "twenty",
        f"{_COUNT} overlays of one base, all streaming, {_RTT_MS} ms, HTTP",
        Unit.SECONDS,
        _prepare,
        (Target(2, _ONE), Target(1.05, figure=WIRE), Target(200, figure=PEAK)),
        note="a base of 512 MiB, 128 if quick; needed is one image",
        runs=2,
    ),
)
