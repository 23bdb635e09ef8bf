"""Child processes that never outlive their test, and waiting for what they do.

Every wait watches the process: a child that dies early is reported with what it said, at once. A wait without a process
to watch, or with one that lives on, ends with the bound that catches hangs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .hang import HANG_SECONDS
from .starter import Forked, needs_interpreter

# The command line in a process of its own.
QEDFS = (sys.executable, "-m", "qedfs")

# Between SIGTERM and SIGKILL. No verdict: a child that needs longer is killed, and its test goes on.
STOP_SECONDS = 30.0
# Between two looks. The later, the rarer: many looks start a program or read long tables, and on a busy machine they
# would keep from its work what is waited for.
POLL_SECONDS = 0.005
MOST_POLL_SECONDS = 0.1

# Columns of /proc/net/unix (flags, __SO_ACCEPTCON) and /proc/net/tcp (state), see proc(5).
_UNIX_LISTENS = "00010000"
_TCP_LISTEN = "0A"


class Died(RuntimeError):
    """A child process ended, or did not get ready in time; the message holds the end of what it printed."""


class Child:
    """One child process with stdout and stderr in a file of its own."""

    def __init__(
        self, argv: Sequence[str | os.PathLike[str]], log: Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        self.argv = [os.fspath(arg) for arg in argv]
        self.log = log
        # A Ctrl-C meant for pytest must not race with the orderly stop: each has a session of its own.
        with log.open("ab") as output, open(os.devnull, "rb") as null:
            self._process = self._start(null.fileno(), output.fileno(), env or {})

    def _start(self, stdin: int, output: int, env: Mapping[str, str]) -> subprocess.Popen[bytes] | Forked:
        environ = {**os.environ, **env}
        return subprocess.Popen(
            self.argv, stdin=stdin, stdout=output, stderr=output, env=environ, start_new_session=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.poll()

    def output(self) -> str:
        """All that the process printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout_seconds: float = HANG_SECONDS) -> int:
        """Waits for the process to end by itself; returns its exit code.

        Raises:
            Died: it still runs after `timeout_seconds`.
        """
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as exc:
            raise Died(self._report(f"still runs after {timeout_seconds} s")) from exc

    def wait_until(self, ready: Callable[[], bool], what: str, timeout_seconds: float = HANG_SECONDS) -> None:
        """Waits until `ready()` is true.

        Raises:
            Died: the process ended first, or `timeout_seconds` passed.
        """
        start = time.monotonic()
        while not ready():
            if self.returncode is not None:
                raise Died(self._report(f"ended with {self.returncode} before {what}"))
            if time.monotonic() > start + timeout_seconds:
                raise Died(self._report(f"no {what} within {timeout_seconds} s"))
            _pause(start)

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """SIGTERM, then SIGKILL after `timeout_seconds`; the process is reaped. Nothing happens if it has ended."""
        if self.returncode is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL; the process is reaped."""
        self._process.kill()
        self._process.wait()

    def _report(self, problem: str) -> str:
        return f"{' '.join(self.argv)}: {problem}\n{self.output()[-4000:]}"


class Command(Child):
    """One `qedfs WORDS...`, forked from a process that has imported it already where that makes no difference."""

    def __init__(self, words: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None) -> None:
        super().__init__([*QEDFS, *words], log, env=env)

    def _start(self, stdin: int, output: int, env: Mapping[str, str]) -> subprocess.Popen[bytes] | Forked:
        environ = {**os.environ, **env}
        if needs_interpreter(environ):
            return super()._start(stdin, output, env)
        return Forked(self.argv[len(QEDFS) :], stdin, output, output, environ=environ, new_session=True)


def wait_for(ready: Callable[[], bool], what: str, timeout_seconds: float = HANG_SECONDS) -> None:
    """Waits until `ready()` is true, without a process to watch.

    Raises:
        TimeoutError: `timeout_seconds` passed.
    """
    start = time.monotonic()
    while not ready():
        if time.monotonic() > start + timeout_seconds:
            raise TimeoutError(f"no {what} within {timeout_seconds} s")
        _pause(start)


def _pause(start: float) -> None:
    """A tenth of what has been waited since `start`, within bounds."""
    time.sleep(min(max((time.monotonic() - start) / 10, POLL_SECONDS), MOST_POLL_SECONDS))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago, for servers that cannot choose one and tell it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listening(address: tuple[str, int] | Path) -> bool:
    """Whether a socket listens at a TCP port of this machine or at a Unix socket.

    The kernel's tables are asked, not the server: some leave after their first client, or count connections.
    """
    if isinstance(address, Path):
        rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
        return any(row[-1] == str(address) and row[3] == _UNIX_LISTENS for row in rows)
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{address[1]:04X}") and row[3] == _TCP_LISTEN for row in rows)
