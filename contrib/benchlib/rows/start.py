"""What a command costs before it has done anything: the processor time of `status` on a complete mount."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.harness.mounts import qedfs

from .. import bounded, ours
from ..figures import MIB
from ..lab import Lab
from ..values import QEDFS, Contenders, Outcome, Row, Target, Unit

PYTHON = "python"
_SECONDS = 120.0
_RUNS = 20

# In a process of its own, whose only children are these commands. The least of the runs is the one least disturbed.
_PROBE = """
import resource, subprocess, sys
def cpu():
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime
least = float("inf")
for _ in range(int(sys.argv[1])):
    before = cpu()
    subprocess.run(sys.argv[2:], check=True, stdout=subprocess.DEVNULL)
    least = min(least, cpu() - before)
print(least * 1000)
"""


def _cpu_ms(*command: str | Path) -> float:
    """The least processor time of a command in milliseconds, user and system."""
    return float(bounded.run([sys.executable, "-c", _PROBE, str(_RUNS), *command], _SECONDS))


def _ours(words: Sequence[str], mountpoint: Path) -> Outcome:
    figures = {
        "version ms": _cpu_ms(*words, "--version"),
        "wait ms": _cpu_ms(*words, "wait", mountpoint),
        "umount ms": _cpu_ms(*words, "umount", "--if-mounted", "/nothing/there"),
    }
    return Outcome(_cpu_ms(*words, "status", mountpoint), figures)


def _python() -> Outcome:
    return Outcome(_cpu_ms(sys.executable, "-c", "pass"))


@contextlib.contextmanager
def _prepare(lab: Lab) -> Iterator[Contenders]:
    overlay = lab.fresh("complete.qed")
    qedfs("create", overlay, "--size", str(MIB))
    with ours.served(lab, overlay) as mount:
        words = [sys.executable, "-m", "qedfs"]
        yield {QEDFS: partial(_ours, words, mount.mountpoint), PYTHON: _python}


ROWS = (
    Row(
        "start",
        "processor time of `status` on a complete mount",
        Unit.MILLISECONDS,
        _prepare,
        (Target(1.5, against=PYTHON),),
        note="beside `python3 -c pass`; importing click alone takes it to twice that",
    ),
)
