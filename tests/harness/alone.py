"""What tests can use one after the other only, because a machine has it once.

Owns the locks, which hold between the workers of a run and between runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_with(thing: str) -> Iterator[None]:
    """Waits until no other test uses `thing`, and keeps others from it for the length of the block."""
    path = Path(tempfile.gettempdir(), f"qedfs-test-{os.getuid()}-{thing}.lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
