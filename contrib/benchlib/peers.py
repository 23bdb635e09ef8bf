"""The plain tools: curl and nbdcopy, which show what a link carries, and nbdkit with nbdfuse."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.harness.require import require

from .lab import Lab, Origin
from .values import Outcome

COPY_SECONDS = 300.0


def download(lab: Lab, origin: Origin, *, keep: bool) -> Outcome:
    """The image in one go with curl or nbdcopy: into a synced file, or to nowhere, which leaves only the link."""
    lab.settle()
    target = lab.fresh("copy.raw") if keep else Path("/dev/null")
    try:
        began = time.monotonic()
        subprocess.run(_copy(origin, target, keep), check=True, timeout=COPY_SECONDS, capture_output=True)
        if keep:
            _sync(target)
        return Outcome(origin.size / (time.monotonic() - began) / 1e6)
    finally:
        if keep:
            target.unlink(missing_ok=True)


def _copy(origin: Origin, target: Path, keep: bool) -> list[str]:
    if origin.http:
        return [require("curl"), "--silent", "--fail", "--output", str(target), origin.url]
    return [require("nbdcopy"), origin.url, str(target) if keep else "null:"]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
