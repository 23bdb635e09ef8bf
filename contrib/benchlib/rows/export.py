"""A complete overlay becomes a raw file, on a file system that shares blocks: how long, and how much room it takes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.harness.mounts import qedfs
from tests.harness.require import require, require_root

from .. import bounded
from ..figures import GIB, MIB
from ..lab import Lab
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_ROOM = 3.5  # times the image: the overlay, a copy of all its bytes, and what the file system needs (Btrfs: a lot)
_NEW = "new MiB"
_SECONDS = 600.0
_MKFS = {"xfs": ("mkfs.xfs", "-q", "-K"), "btrfs": ("mkfs.btrfs", "-q", "-K")}


@contextlib.contextmanager
def _file_system(lab: Lab, kind: str, size: int) -> Iterator[Path]:
    """A file system of that kind in a sparse file."""
    require_root()
    disk, folder = lab.fresh(kind), lab.fresh("fs")
    with disk.open("wb") as file:
        file.truncate(size)
    maker, *options = _MKFS[kind]
    bounded.run([require(maker), *options, disk], _SECONDS)
    folder.mkdir()
    bounded.run(["mount", "-o", "loop", disk, folder], _SECONDS)
    try:
        yield folder
    finally:
        bounded.run(["umount", folder], _SECONDS)
        disk.unlink()


def _used(folder: Path) -> int:
    subprocess.run(["sync", "--file-system", folder], check=True, timeout=_SECONDS)
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _export(command: Sequence[str | Path], folder: Path) -> Outcome:
    target = folder / "disk.raw"
    before = _used(folder)
    began = time.monotonic()
    bounded.run([*command, target], _SECONDS)
    seconds = time.monotonic() - began
    new = _used(folder) - before
    target.unlink()
    return Outcome(seconds, {_NEW: new / MIB})


@contextlib.contextmanager
def _prepare(kind: str, lab: Lab) -> Iterator[Contenders]:
    gib = lab.pick(10, 1)
    with _file_system(lab, kind, int(_ROOM * gib * GIB)) as folder:
        overlay = folder / "disk.qed"
        qedfs("create", overlay, "--size", f"{gib}G")
        for pos in range(gib):
            bounded.run([require("qemu-io"), "-f", "qed", "-c", f"write -P {pos + 1} {pos}G 1G", overlay], _SECONDS)
        yield {
            QEDFS: partial(_export, [sys.executable, "-m", "qedfs", "export", "--quiet", overlay], folder),
            QEMU: partial(_export, [require("qemu-img"), "convert", "-f", "qed", "-O", "raw", overlay], folder),
        }


ROWS = tuple(
    Row(
        f"export-{kind}",
        f"export a complete overlay of 10 GiB to a raw file beside it, on {name}",
        Unit.SECONDS,
        partial(_prepare, kind),
        (Target(2), Target(20, figure=_NEW)),
        note="root; writes 10 GiB before; with --quick 1 GiB",
        runs=3,
    )
    for kind, name in (("xfs", "XFS"), ("btrfs", "Btrfs"))
)
