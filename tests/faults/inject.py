"""`qedfs` with one fault at one of its system calls that write: which one is counted over all threads.

    python -m tests.faults.inject COUNT_FILE NUMBER ACTION mount ...

strace counts its injections for each thread by itself, and the worker threads of a mount share its writes by chance:
"the n-th" is then another call in every run, and some calls are never the n-th of any thread. So the calls are counted
here, where they leave Python. The process and the kernel are real, and so is the SIGKILL.

At its end the process, if it lives, writes to COUNT_FILE how many calls there were.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

CALLS = ("pwrite", "pwritev", "fdatasync", "ftruncate")
# What can be done to a call, by name; `tear` and `short` are for those that carry data.
ACTIONS = ("kill", "tear", "ENOSPC", "EIO", "short")


class Injector:
    """Stands in front of the calls. Thread-safe."""

    def __init__(self, number: int, action: str) -> None:
        """`number`: the call, counted from 1, that gets `action`; 0: none."""
        self.calls = 0
        self._number = number
        self._action = action
        self._lock = threading.Lock()

    def install(self) -> None:
        """Replace the calls in `os`."""
        for name in CALLS:
            setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            with self._lock:
                self.calls += 1
                hit = self.calls == self._number
            return self._act(call, args) if hit else call(*args)

        return wrapper

    def _act(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._action in ("ENOSPC", "EIO"):
            number = getattr(errno, self._action)
            raise OSError(number, os.strerror(number))
        if self._action in ("tear", "short"):
            args = _halved(args)
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args)
        if self._action == "tear":
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def _halved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that writes the first half only; those of the other calls as they are."""
    if len(args) < 3:
        return args
    data = b"".join(args[1]) if isinstance(args[1], list) else bytes(args[1])
    half = data[: max(1, len(data) // 2)]
    return (args[0], [half] if isinstance(args[1], list) else half, *args[2:])


def main() -> None:
    """Run `qedfs` with the arguments behind ours."""
    count_file, number, action, *arguments = sys.argv[1:]
    if action not in ACTIONS:
        sys.exit(f"no such action: {action}")
    sys.argv = ["qedfs", *arguments]
    from qedfs.cli.main import main as qedfs

    injector = Injector(int(number), action)
    injector.install()
    try:
        qedfs()
    finally:
        with open(count_file, "w", encoding="ascii") as file:
            file.write(str(injector.calls))


if __name__ == "__main__":
    main()
