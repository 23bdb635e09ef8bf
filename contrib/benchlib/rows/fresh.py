"""First writes: 4 KiB into clusters that the overlay does not have, whose rest comes over NBD on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from tests.harness.servers import nbdkit

from .. import fio, ours, qemu
from ..figures import GIB
from ..lab import Lab, Origin
from ..traffic import Traffic
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

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


ROWS = (_row(1, 2.0), _row(16, 1.2))
