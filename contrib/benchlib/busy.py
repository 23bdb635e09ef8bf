"""Other work for all processors, for as long as a block lasts. Owns the processes; must not know what is measured."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def processors(busy: bool) -> Iterator[None]:
    """One process per processor that computes without a pause, as `stress-ng --cpu` does. None if not `busy`."""
    count = len(os.sched_getaffinity(0)) if busy else 0
    running = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
