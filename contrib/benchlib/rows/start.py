"""What commands cost before they do anything: processor time of those on a complete mount, and of its start."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.harness.mounts import qedfs

from .. import bounded
from ..figures import MIB
from ..lab import Lab
from ..values import QEDFS, Contenders, Outcome, Row, Target, Unit

PYTHON = "python"
_SECONDS = 240.0
_RUNS = 20

# In a process of its own, whose only children are these commands. The least of the runs is the one least disturbed. The
# commands take turns, so that each finds what the one before it has left; what a daemon uses itself is not in it.
_PROBE = """
import json, resource, subprocess, sys
def cpu():
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime
commands = json.loads(sys.argv[2])
least = [float("inf")] * len(commands)
for _ in range(int(sys.argv[1])):
    for number, command in enumerate(commands):
        before = cpu()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        least[number] = min(least[number], cpu() - before)
print(json.dumps([seconds * 1000 for seconds in least]))
"""


def _cpu_ms(*commands: Sequence[str | Path]) -> list[float]:
    """The least processor time of each command in milliseconds, user and system."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    found: list[float] = json.loads(bounded.run([sys.executable, "-c", _PROBE, str(_RUNS), words], _SECONDS))
    return found


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
