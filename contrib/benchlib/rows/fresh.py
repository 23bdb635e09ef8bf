"""First writes, into clusters that the overlay does not have. The rest comes over NBD on this machine, or is zeros."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from tests.harness.images import qemu_create
from tests.harness.servers import nbdkit

from .. import fio, ours, qemu
from ..figures import GIB, KIB
from ..lab import Lab, Origin
from ..traffic import Traffic
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit
from .complete import measure

_CLUSTER_SIZE = 65536


def _ours(lab: Lab, origin: Origin, job: fio.Job) -> Outcome:
    with ours.cold(lab, origin) as (_, image):
        return _outcome(fio.run(image, job))


def _qemu(lab: Lab, origin: Origin, job: fio.Job) -> Outcome:
    with qemu.cold_overlay(lab, origin) as overlay, qemu.exported(lab, overlay) as (_, image):
        return _outcome(fio.run(image, job))


def _outcome(report: fio.Report) -> Outcome:
    return Outcome(report.iops, {"p99 ms": report.p99_ms, "writes": report.operations})


def _row(depth: int, target: float) -> Row:
    @contextlib.contextmanager
    def prepare(lab: Lab) -> Iterator[Contenders]:
        size = 2 * GIB
        job = fio.Job("randwrite", 4096, depth, lab.fio_seconds, stride=_CLUSTER_SIZE)
        # No log here: at this rate writing it would be a good part of the work.
        with nbdkit("file", lab.base(size), tcp=True) as server:
            lab.prefer(server.pid)
            origin = Origin(server.url, size, Traffic(lambda: (), lambda: None))
            yield {QEDFS: partial(_ours, lab, origin, job), QEMU: partial(_qemu, lab, origin, job)}

    return Row(
        f"first-write-d{depth}",
        f"4 KiB first writes on a fresh overlay, NBD loopback, depth {depth}",
        Unit.IOPS,
        prepare,
        (Target(target, QEMU),),
    )


def _append(lab: Lab, contender: str, job: fio.Job) -> Outcome:
    """The job on a new overlay without a backing."""
    overlay = qemu_create(lab.fresh(f"{contender}.qed"), size=GIB)
    try:
        if contender == QEMU:
            with qemu.exported(lab, overlay) as (daemon, image):
                return measure(lab, image, job, Unit.IOPS, daemon.pid)
        with ours.served(lab, overlay) as mount:
            return measure(lab, ours.image_path(mount, overlay), job, Unit.IOPS, mount.pid)
    finally:
        overlay.unlink()


@contextlib.contextmanager
def _prepare_append(lab: Lab) -> Iterator[Contenders]:
    job = fio.Job("write", 16 * KIB, seconds=lab.fio_seconds, direct=False, sync="fdatasync")
    yield {name: partial(_append, lab, name, job) for name in (QEDFS, QEMU)}


ROWS = (
    _row(1, 2.0),
    _row(16, 1.2),
    Row(
        "append-16k-fdatasync",
        "16 KiB write and fdatasync into new clusters, no backing",
        Unit.IOPS,
        _prepare_append,
        (Target(1.0, QEMU),),
    ),
)
