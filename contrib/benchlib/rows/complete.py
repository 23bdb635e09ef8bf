"""Reads and writes of an image that is all there: what the way through FUSE costs, next to QEMU's FUSE export.

Both serve an overlay that QEMU filled, byte for byte the same file, and all of it is in the page cache before the first
run. The limit is the same job on a plain file of the same disk.
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
from ..figures import GIB, KIB, MIB
from ..lab import Lab
from ..usage import cpu_seconds
from ..values import LIMIT, QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_COPY_SECONDS = 120.0


def _row(name: str, title: str, target: float, job: fio.Job) -> Row:
    unit = Unit.IOPS if job.block_size < MIB else Unit.MB_PER_SECOND

    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        timed = dataclasses.replace(job, seconds=lab.fio_seconds)
        with (
            _filled(lab) as (one, other, plain),
            ours.served(lab, one) as mount,
            qemu.exported(lab, other) as (daemon, image),
        ):
            warm(one, other, plain)
            yield {
                QEDFS: partial(measure, lab, ours.image_path(mount, one), timed, unit, mount.pid),
                QEMU: partial(measure, lab, image, timed, unit, daemon.pid),
                LIMIT: partial(measure, lab, plain, timed, unit),
            }

    return Row(name, title, unit, prepare, (Target(target, QEMU),), note="limit: the same on a plain file")


@contextlib.contextmanager
def _filled(lab: Lab) -> Iterator[tuple[Path, Path, Path]]:
    """Two equal complete overlays and a raw file with the same bytes, on the disk."""
    filled = lab.fresh("full.qed")
    copies = lab.fresh("full.qed"), lab.fresh("full.qed"), lab.fresh("full.raw")
    argv = [require("qemu-img"), "convert", "-f", "raw", "-O", "qed", str(lab.base(GIB)), str(filled)]
    try:
        subprocess.run(argv, check=True, timeout=_COPY_SECONDS)
        # All three are written in the same way: the size of the page cache's folios depends on it, and with that, on
        # newer kernels, what a small write costs.
        for source, copy in zip((filled, filled, lab.base(GIB)), copies, strict=True):
            shutil.copyfile(source, copy)
        lab.settle()
        yield copies
    finally:
        for path in (filled, *copies):
            path.unlink(missing_ok=True)


def warm(*files: Path) -> None:
    """Read files into the page cache, after they were opened: qedfs evicts an overlay that it did not close itself."""
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL, timeout=_COPY_SECONDS)


def measure(lab: Lab, file: Path, job: fio.Job, unit: Unit, pid: int | None = None) -> Outcome:
    """A fio job on `file`; `pid` is of the process that serves it."""
    lab.settle()
    before = cpu_seconds(pid) if pid else 0.0
    report = fio.run(file, job)
    figures = {"p99 ms": report.p99_ms}
    if pid:
        figures["CPU us/op"] = (cpu_seconds(pid) - before) / report.operations * 1e6
    return Outcome(report.iops if unit is Unit.IOPS else report.bytes_per_second / 1e6, figures)


ROWS = (
    _row("read-4k-d1", "4 KiB random reads, complete image, O_DIRECT, depth 1", 1.0, fio.Job("randread", 4096)),
    _row("read-4k-d16", "the same, depth 16", 1.1, fio.Job("randread", 4096, depth=16)),
    _row("read-1m", "1 MiB reads, complete image, O_DIRECT", 2.5, fio.Job("read", MIB)),
    _row("read-buffered", "sequential buffered reads, complete image", 1.5, fio.Job("read", MIB, direct=False)),
    _row("write-4k-d1", "4 KiB random writes, complete image, depth 1", 1.0, fio.Job("randwrite", 4096)),
    _row("write-4k-d16", "the same, depth 16", 1.0, fio.Job("randwrite", 4096, depth=16)),
    _row("write-1m", "1 MiB writes, complete image, O_DIRECT", 1.0, fio.Job("write", MIB)),
    _row("write-buffered", "1 MiB buffered writes, complete image", 1.0, fio.Job("write", MIB, direct=False)),
    _row(
        "write-4k-fsync",
        "4 KiB random write and fsync, complete image",
        1.0,
        fio.Job("randwrite", 4096, direct=False, sync="fsync"),
    ),
    _row(
        "write-16k-fdatasync",
        "16 KiB write and fdatasync in place, complete image",
        1.0,
        fio.Job("write", 16 * KIB, direct=False, sync="fdatasync"),
    ),
)
