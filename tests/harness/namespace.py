"""A table of mounts of its own, without the qedfs mounts of the machine: for tests of what is mounted at all.

Owns the namespace, which ends with the block, and with it what is mounted there. Knows nothing of the commands.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import starter
from .hang import HANG_SECONDS
from .mounts import COMMAND_SECONDS
from .require import require, require_fuse, require_root

# Lazily: a copy of the table would hold the mounts of other tests.
_HOLDER = """
import ctypes, sys
from qedfs.host.procfs import mounts
def let_go():
    for line in mounts():
        if line.kind == "fuse.qedfs":
            ctypes.CDLL(None).umount2(line.place, 2)
let_go()
print(flush=True)
sys.stdin.read()
let_go()  # a server ends with its last mount; until then it keeps the namespace
"""


class Namespace:
    """Runs programs in the namespace."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.enter = (require("nsenter"), "-t", str(pid), "-m", "--")  # a command that runs another one there

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            [*self.enter, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
            stdin=subprocess.DEVNULL,
        )

    def qedfs(self, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command, which must exit with `code`."""
        done = starter.run(
            [str(word) for word in words], timeout_seconds=COMMAND_SECONDS, environ=os.environ, mounts_of=self._pid
        )
        if done.returncode != code:
            raise RuntimeError(f"qedfs {words}: exit code {done.returncode}\n{done.stderr}{done.stdout}")
        return done


@contextlib.contextmanager
def own_mounts() -> Iterator[Namespace]:
    """A namespace without qedfs mounts."""
    require_root()
    require_fuse()
    words = [require("unshare"), "-m", "--propagation", "private", sys.executable, "-c", _HOLDER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"\n"
            yield Namespace(holder.pid)
        finally:
            holder.stdin.close()
            holder.wait(HANG_SECONDS)
