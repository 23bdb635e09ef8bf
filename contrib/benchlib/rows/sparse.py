"""An overlay of 2 TiB with nothing in it: opened, and its map told."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.harness.mounts import qedfs
from tests.harness.require import require

from .. import bounded, ours
from ..figures import MIB, PEAK
from ..lab import Lab
from ..usage import peak_mib
from ..values import QEDFS, QEMU, Contenders, Outcome, Row, Target, Unit

_BIG_SIZE = 2 << 40
_SMALL_SIZE = MIB
_MAP_SECONDS = 120.0
_TRIES = 5

# A small process of its own starts the tool: a child's peak memory begins with its parent's (getrusage(2), fork).
_PROBE = """
import resource, subprocess, sys, time
best = float("inf")
for _ in range(int(sys.argv[1])):
    began = time.monotonic()
    subprocess.run(sys.argv[2:], check=True, stdout=subprocess.DEVNULL)
    best = min(best, time.monotonic() - began)
print(best * 1000, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _map(tool: Sequence[str], overlay: Path) -> tuple[float, float]:
    """Milliseconds (the best of some) and peak MiB of a command that prints the map of an overlay."""
    printed = bounded.run([sys.executable, "-c", _PROBE, str(_TRIES), *tool, overlay], _MAP_SECONDS)
    milliseconds, peak_kib = printed.split()
    return float(milliseconds), int(peak_kib) / 1024


def _measure(tool: Sequence[str], big: Path, small: Path) -> Outcome:
    start_ms, start_mib = _map(tool, small)
    whole_ms, whole_mib = _map(tool, big)
    return Outcome(max(0.0, whole_ms - start_ms), {PEAK: whole_mib, "start ms": start_ms, "start MiB": start_mib})


def _ours(lab: Lab, big: Path, small: Path) -> Outcome:
    outcome = _measure([sys.executable, "-m", "qedfs", "map", "--json"], big, small)
    with ours.served(lab, big) as mount:
        mount.status()
        return Outcome(outcome.value, {**outcome.figures, "mount peak MiB": peak_mib(mount.pid)})


def _qemu(big: Path, small: Path) -> Outcome:
    return _measure([require("qemu-img"), "map", "--output=json", "-f", "qed"], big, small)


@contextlib.contextmanager
def _prepare(lab: Lab) -> Iterator[Contenders]:
    with lab.origin("http", 64 * MIB) as origin:
        big, small = lab.fresh("big.qed"), lab.fresh("small.qed")
        for path, size in ((big, _BIG_SIZE), (small, _SMALL_SIZE)):
            qedfs("create", path, "--backing", origin.url, "--offline", "--size", str(size))
        yield {QEDFS: partial(_ours, lab, big, small), QEMU: partial(_qemu, big, small)}


ROWS = (
    Row(
        "sparse-2t",
        "open and map an empty overlay of 2 TiB",
        Unit.MILLISECONDS,
        _prepare,
        (Target(100), Target(50, figure=PEAK)),
        note="time beyond the same command on an overlay of 1 MiB, so without the start of Python",
    ),
)
