"""Commands with a deadline that holds even if the kernel will not let them go.

A process that reads from a mount which no longer answers cannot be killed until the mount's own process has ended
(fuse: an interrupted request is waited for). So a command that is late is killed and left behind; the mount that it
hangs on is taken down by whoever made it, and that sets it free.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Sequence

_KILLED_SECONDS = 1.0
_UNMOUNT_SECONDS = 10.0


class Failed(RuntimeError):
    """A command ended with an exit code other than 0, or not in time."""


def detach(mountpoint: os.PathLike[str]) -> None:
    """Unmounts lazily, if something is mounted there; whatever state it is in, nobody waits long for it."""
    with contextlib.suppress(Failed):
        run(["umount", "--lazy", mountpoint], _UNMOUNT_SECONDS)


def run(argv: Sequence[str | os.PathLike[str]], timeout_seconds: float) -> str:
    """Runs a command and returns what it printed to stdout.

    Raises:
        Failed: it failed, or took longer; the message holds what it printed to stderr.
    """
    words = " ".join(os.fspath(word) for word in argv)
    # Files, not pipes: nobody has to wait for their end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            code = process.wait(timeout_seconds)
        except BaseException as exc:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_SECONDS)
            if isinstance(exc, subprocess.TimeoutExpired):
                raise Failed(f"{words}: not done after {timeout_seconds:g} s") from exc
            raise
        out.seek(0)
        err.seek(0)
        if code != 0:
            raise Failed(f"{words}: exit code {code}: {err.read().strip()[-500:]}")
        return out.read()
