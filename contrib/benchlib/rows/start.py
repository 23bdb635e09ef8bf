"""What commands cost before they do anything: processor time of those on a complete mount, and of its start."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.harness.mounts import qedfs

from .. import processor
from ..figures import MIB
from ..lab import Lab
from ..values import QEDFS, Contenders, Outcome, Row, Target, Unit

PYTHON = "python"
_SECONDS = 240.0
_RUNS = 20


def _cpu_ms(*commands: Sequence[str | Path]) -> list[float]:
    return processor.cpu_ms(_RUNS, _SECONDS, *commands)


def _ours(words: Sequence[str], overlay: Path, mountpoint: Path) -> Outcome:
    version, mount, status, wait, umount = _cpu_ms(
        [*words, "--version"],
        [*words, "mount", overlay, mountpoint, "--daemon"],
        [*words, "status", mountpoint],
        [*words, "wait", mountpoint],
        [*words, "umount", mountpoint],
    )
    figures = {"version ms": version, "mount --daemon ms": mount, "wait ms": wait, "umount ms": umount}
    return Outcome(status, figures)


def _python() -> Outcome:
    (least,) = _cpu_ms([sys.executable, "-c", "pass"])
    return Outcome(least)


@contextlib.contextmanager
def _prepare(lab: Lab) -> Iterator[Contenders]:
    overlay = lab.fresh("complete.qed")
    qedfs("create", overlay, "--size", str(MIB))
    mountpoint = lab.fresh("mnt")
    mountpoint.mkdir()
    words = [sys.executable, "-m", "qedfs"]
    try:
        yield {QEDFS: partial(_ours, words, overlay, mountpoint), PYTHON: _python}
    finally:
        qedfs("umount", mountpoint, "--if-mounted")


ROWS = (
    Row(
        "start",
        "processor time of `status` on a complete mount",
        Unit.MILLISECONDS,
        _prepare,
        (Target(1.5, against=PYTHON),),
        note="beside `python3 -c pass`; targets: --daemon 3, umount 2",
    ),
)
