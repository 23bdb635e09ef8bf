"""The processor time of commands: the least of some runs, which is the one least disturbed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import bounded

# In a process of its own, whose only children are these commands. The commands take turns, so that each finds what the
# one before it has left; what a daemon uses itself is not in it.
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


def cpu_ms(runs: int, timeout_seconds: float, *commands: Sequence[str | Path]) -> list[float]:
    """The least processor time of each command in milliseconds, user and system.

    Raises:
        Failed: a command has failed, or all together took longer.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    found: list[float] = json.loads(bounded.run([sys.executable, "-c", _PROBE, str(runs), words], timeout_seconds))
    return found
