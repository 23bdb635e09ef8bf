"""Barriers while 256 MiB stream in over loopback, counted by strace, which is not there when time is measured."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.harness.mounts import is_mounted, qedfs
from tests.harness.process import Child
from tests.harness.require import require

from .. import ours, qemu
from ..figures import GIB, MIB
from ..lab import Lab, Origin
from ..qmp import Qmp
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_SIZE = 256 * MIB
_CALLS = "fdatasync,fsync"
_END_SECONDS = 60.0


def _strace(log: Path) -> list[str]:
    # --seccomp-bpf: the process stops at these calls only, so that groups of commits form as they would without strace.
    return [require("strace"), "--follow-forks", "--seccomp-bpf", "-qq", "-e", f"trace={_CALLS}", "-o", str(log)]


def _count(log: Path) -> Outcome:
    # One line per call; one that another thread interrupts is told a second time as resumed.
    calls = len(re.findall(r" f(?:data)?sync\(", log.read_text()))
    return Outcome(calls * GIB / _SIZE, {"barriers": calls})


def _ours(lab: Lab, origin: Origin) -> Outcome:
    log, mountpoint = lab.fresh("strace"), lab.fresh("mnt")
    overlay = ours.create(lab.fresh("ours.qed"), origin.url)
    mountpoint.mkdir()
    argv = [*_strace(log), sys.executable, "-m", "qedfs", "mount", "--no-stream", str(overlay), str(mountpoint)]
    child = Child(argv, lab.fresh("log"))
    try:
        child.wait_until(lambda: is_mounted(mountpoint), "a mount")
        with Qmp(Path(json.loads(qedfs("status", mountpoint, "--json").stdout)["socket"])) as qmp:
            qmp.execute("block-stream", device=overlay.stem)
            qmp.wait_for_jobs(1, ours.STREAM_SECONDS)
        qedfs("umount", mountpoint)
        child.wait(_END_SECONDS)
        return _count(log)
    finally:
        if is_mounted(mountpoint):
            qedfs("umount", mountpoint, check=False)
        child.stop()
        overlay.unlink()


def _qemu(lab: Lab, origin: Origin) -> Outcome:
    log = lab.fresh("strace")
    with (
        qemu.cold_overlay(lab, origin) as overlay,
        qemu.daemon(lab, *qemu.blockdev(overlay), under=_strace(log)) as running,
        Qmp(running.socket) as qmp,
    ):
        qmp.execute("block-stream", device="disk", job_id="stream")
        qmp.wait_for_jobs(1, qemu.STREAM_SECONDS)
        qmp.execute("quit")
        running.wait(_END_SECONDS)
        return _count(log)


@contextlib.contextmanager
def _prepare(lab: Lab) -> Iterator[Contenders]:
    with lab.origin("http", _SIZE) as origin:
        yield {QEDFS: partial(_ours, lab, origin), QEMU: partial(_qemu, lab, origin)}


ROWS = (
    Row(
        "barriers",
        "fdatasync and fsync calls while streaming, loopback, HTTP",
        Unit.PER_GIB,
        _prepare,
        (Target(64),),
        runs=1,
    ),
)
