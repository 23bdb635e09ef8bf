"""Reads and writes of an image that is all there: what the way through FUSE costs, next to QEMU's FUSE export.

Both serve an overlay that QEMU filled, byte for byte the same file; it is in the page cache before the first run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.harness.require import require

from .. import fio, ours, qemu
from ..lab import Lab
from ..usage import cpu_seconds
from ..values import GIB, MIB, QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_CONVERT_SECONDS = 120.0


def _row(name: str, title: str, unit: Unit, target: float, job: fio.Job) -> Row:
    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        with _both(lab) as (our_pid, our_image, qemu_pid, qemu_image):
            timed = dataclasses.replace(job, seconds=lab.fio_seconds)
            yield {
                QEDFS: partial(_measure, lab, our_pid, our_image, timed, unit),
                QEMU: partial(_measure, lab, qemu_pid, qemu_image, timed, unit),
            }

    return Row(name, title, unit, prepare, Target(target, QEMU))


@contextlib.contextmanager
def _both(lab: Lab) -> Iterator[tuple[int, Path, int, Path]]:
    with _filled(lab) as (one, other), ours.served(lab, one) as mount, qemu.exported(lab, other) as (daemon, image):
        yield mount.pid, ours.image_path(mount, one), daemon.pid, image


@contextlib.contextmanager
def _filled(lab: Lab) -> Iterator[tuple[Path, Path]]:
    """Two equal complete overlays, in the page cache and on the disk."""
    one, other = lab.fresh("full.qed"), lab.fresh("full.qed")
    argv = [require("qemu-img"), "convert", "-f", "raw", "-O", "qed", str(lab.base(GIB)), str(one)]
    try:
        subprocess.run(argv, check=True, timeout=_CONVERT_SECONDS)
        shutil.copyfile(one, other)
        lab.settle()
        subprocess.run(["cat", one, other], check=True, stdout=subprocess.DEVNULL, timeout=_CONVERT_SECONDS)
        yield one, other
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def _measure(lab: Lab, pid: int, image: Path, job: fio.Job, unit: Unit) -> Outcome:
    lab.settle()
    before = cpu_seconds(pid)
    report = fio.run(image, job)
    cpu = cpu_seconds(pid) - before
    figures = {"p99 ms": report.p99_ms}
    if unit is Unit.IOPS:
        figures["CPU us/op"] = cpu / max(1.0, report.iops * job.seconds) * 1e6
        return Outcome(report.iops, figures)
    return Outcome(report.bytes_per_second / 1e6, figures)


ROWS = (
    _row("read-4k-d1", "4 KiB random reads, complete, O_DIRECT, depth 1", Unit.IOPS, 1.0, fio.Job("randread", 4096)),
    _row(
        "read-4k-d16",
        "4 KiB random reads, complete, O_DIRECT, depth 16",
        Unit.IOPS,
        1.1,
        fio.Job("randread", 4096, depth=16),
    ),
    _row("read-1m", "1 MiB reads, complete, O_DIRECT", Unit.MB_PER_SECOND, 2.5, fio.Job("read", MIB)),
    _row(
        "read-buffered",
        "sequential reads, complete, buffered",
        Unit.MB_PER_SECOND,
        1.5,
        fio.Job("read", MIB, direct=False, once=True),
    ),
    _row("write-4k-d1", "4 KiB random writes, complete, depth 1", Unit.IOPS, 1.0, fio.Job("randwrite", 4096)),
    _row(
        "write-4k-d16",
        "4 KiB random writes, complete, depth 16",
        Unit.IOPS,
        1.0,
        fio.Job("randwrite", 4096, depth=16),
    ),
)
