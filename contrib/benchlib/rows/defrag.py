"""An overlay that was filled in the order of chance, after its defragmentation and during it.

Reads are compared with those of an overlay that qemu-img has converted from the same bytes, and of the overlay as it
was before. Guests' reads beside the job are compared with those of a mount without one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.harness.mounts import qedfs
from tests.harness.require import require, require_root

from .. import bounded, fio, ours
from ..figures import GIB, KIB, MIB
from ..lab import Lab
from ..values import LIMIT, QEDFS, Contenders, Outcome, Row, Target, Unit
from .complete import measure, warm

_CLUSTER_SIZE = 64 * KIB
_SECONDS = 300.0
_SCATTERED = "scattered"
_OFF = "job off"
_CACHES = Path("/proc/sys/vm/drop_caches")


@contextlib.contextmanager
def _scattered(lab: Lab) -> Iterator[Path]:
    """A complete overlay whose clusters were written in a shuffled order."""
    size = lab.pick(GIB, GIB // 4)
    overlay = lab.fresh("scattered.qed")
    try:
        qedfs("create", overlay, "--size", str(size))
        with ours.served(lab, overlay) as mount:
            fio.run(
                ours.image_path(mount, overlay), fio.Job("randwrite", _CLUSTER_SIZE, 1, _SECONDS, stride=_CLUSTER_SIZE)
            )
        yield overlay
    finally:
        overlay.unlink(missing_ok=True)


@contextlib.contextmanager
def _layouts(lab: Lab) -> Iterator[tuple[Path, Path, Path]]:
    """The same image three times: defragmented, as it was, and converted."""
    with _scattered(lab) as scattered:
        ordered, converted = lab.fresh("ordered.qed"), lab.fresh("converted.qed")
        try:
            shutil.copyfile(scattered, ordered)
            with ours.served(lab, ordered) as mount:
                qedfs("defrag", "--quiet", mount.mountpoint, ordered.stem)
            bounded.run([require("qemu-img"), "convert", "-f", "qed", "-O", "qed", scattered, converted], _SECONDS)
            lab.settle()
            yield ordered, scattered, converted
        finally:
            ordered.unlink(missing_ok=True)
            converted.unlink(missing_ok=True)


def _cold(lab: Lab, file: Path) -> Outcome:
    """All of a file read from the disk, once."""
    lab.settle()
    _CACHES.write_text("3")
    report = fio.run(file, fio.Job("read", MIB, seconds=_SECONDS, direct=False, stride=MIB))
    return Outcome(report.bytes_per_second / 1e6)


@contextlib.contextmanager
def _reads(lab: Lab, *, cold: bool) -> Iterator[Contenders]:
    if cold:
        require_root()
    job = fio.Job("read", MIB, seconds=lab.fio_seconds, direct=False)
    with contextlib.ExitStack() as stack:
        layouts = stack.enter_context(_layouts(lab))
        found = {}
        for name, overlay in zip((QEDFS, _SCATTERED, LIMIT), layouts, strict=True):
            mount = stack.enter_context(ours.served(lab, overlay))
            image = ours.image_path(mount, overlay)
            found[name] = partial(_cold, lab, image) if cold else partial(measure, lab, image, job, Unit.MB_PER_SECOND)
        warm(*layouts)
        yield found


def _guest(lab: Lab, scattered: Path, *, beside: bool) -> Outcome:
    overlay = lab.fresh("disk.qed")
    shutil.copyfile(scattered, overlay)
    lab.settle()
    try:
        with ours.served(lab, overlay) as mount:
            image = ours.image_path(mount, overlay)
            if beside:
                qedfs("defrag", "--no-wait", mount.mountpoint, overlay.stem)
            report = fio.run(image, fio.Job("randread", 4 * KIB, 1, lab.fio_seconds))
            job = mount.image()["job"]
            figures = {"job done": job["done"] / job["total"]} if beside else {}
        return Outcome(report.p99_ms, {"mean ms": report.mean_ms, **figures})
    finally:
        overlay.unlink()


@contextlib.contextmanager
def _beside(lab: Lab) -> Iterator[Contenders]:
    with _scattered(lab) as overlay:
        yield {QEDFS: partial(_guest, lab, overlay, beside=True), _OFF: partial(_guest, lab, overlay, beside=False)}


ROWS = (
    Row(
        "defrag-read",
        "sequential buffered reads of a defragmented overlay, in the page cache",
        Unit.MB_PER_SECOND,
        partial(_reads, cold=False),
        (Target(0.95, LIMIT),),
        note="limit: an overlay that qemu-img has converted, served by qedfs",
    ),
    Row(
        "defrag-read-cold",
        "the same, host cache dropped",
        Unit.MB_PER_SECOND,
        partial(_reads, cold=True),
        (Target(0.95, LIMIT),),
        note="root; limit: as above",
    ),
    Row(
        "defrag-p99",
        "p99 of 4 KiB random reads of a guest beside a defragmentation",
        Unit.MILLISECONDS,
        _beside,
        (Target(1.3, _OFF),),
        note="the job must not be done before the reads end",
    ),
)
