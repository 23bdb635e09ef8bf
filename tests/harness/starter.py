"""Starts `qedfs WORDS...` in a few milliseconds: a process that has imported the program forks for each command.

Owns the protocol between a run of the tests and that process, its starter. Half of the processor time of the tests was
spent by `python -m qedfs` on its imports. A fork has everything else that a program of its own has: descriptors,
environment, working folder, session, signals, exit status. What only a new interpreter obeys (`needs_interpreter`)
is started the ordinary way. What else a process inherits is that of the starter: a test that changes its own limits or
umask has to start the command itself.

A message to the starter is one packet: a dict as Python writes it, and four descriptors, stdin, stdout, stderr and the
report. Into the report the starter writes the process id, and the exit status when the process has ended.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import itertools
import os
import pkgutil
import select
import selectors
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_ROOT = Path(__file__).parents[2]
_NUMBER = struct.Struct("=i")
_MOST_BYTES = 1 << 17  # of a packet; below what a socket takes by default (net.core.wmem_default)

_CLONE_NEWNS = 0x20000  # <linux/sched.h>

# Read when an interpreter or a library starts, before the command could change them.
_INTERPRETER = ("PYTHON", "LD_", "LANG", "LC_", "TZ", "MALLOC_", "GLIBC_", "COVERAGE_")


def _read_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_INTERPRETER)}


_BEFORE = _read_at_start(os.environ)  # what the starter has


def needs_interpreter(environ: Mapping[str, str]) -> bool:
    """Whether this environment differs from that of the starter in what counts only when an interpreter starts."""
    return _read_at_start(environ) != _BEFORE


class Forked:
    """A process forked by the starter; what `subprocess.Popen` offers, as far as the tests use it."""

    def __init__(
        self,
        words: Sequence[str],
        stdin: int,
        stdout: int,
        stderr: int,
        *,
        environ: Mapping[str, str],
        new_session: bool = False,
        mounts_of: int | None = None,
    ) -> None:
        """`mounts_of`: a process whose table of mounts it shares."""
        request = {"words": words, "env": dict(environ), "cwd": os.getcwd(), "session": new_session}
        request["mounts_of"] = mounts_of
        self._report, theirs = os.pipe()
        try:
            packet = repr(request).encode()
            socket.send_fds(_starter(), [packet], [stdin, stdout, stderr, theirs])
        finally:
            os.close(theirs)
        self.pid = self._number()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when there is one.

        Raises:
            subprocess.TimeoutExpired: the process still runs after `timeout` seconds.
        """
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._report, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("qedfs", timeout or 0)
            self.returncode = self._number()
            os.close(self._report)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _number(self) -> int:
        data = os.read(self._report, _NUMBER.size)
        if len(data) < _NUMBER.size:
            raise RuntimeError("the starter of qedfs has ended")
        return int(_NUMBER.unpack(data)[0])


def run(
    words: Sequence[str], *, timeout_seconds: float, environ: Mapping[str, str], mounts_of: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end and returns what it printed, as `subprocess.run` does. `mounts_of`: as for `Forked`.

    Raises:
        subprocess.TimeoutExpired: it did not end in time, or left its output open to another process; it was killed.
    """
    deadline = time.monotonic() + timeout_seconds
    outputs = [os.pipe(), os.pipe()]
    with open(os.devnull, "rb") as null:
        process = Forked(words, null.fileno(), outputs[0][1], outputs[1][1], environ=environ, mounts_of=mounts_of)
    for _, theirs in outputs:
        os.close(theirs)
    try:
        printed = _read_all([ours for ours, _ in outputs], deadline)
        process.wait(max(0, deadline - time.monotonic()))
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        for ours, _ in outputs:
            os.close(ours)
    stdout, stderr = (data.decode().replace("\r\n", "\n") for data in printed)
    return subprocess.CompletedProcess(["qedfs", *words], process.wait(), stdout, stderr)


def program() -> tuple[str, int]:
    """A script `qedfs` for shells, whose commands are forked like all others; and the descriptor that it inherits."""
    return f'#!/bin/sh\nexec {shlex.join(_client())} "$@"\n', _starter().fileno()


def popen(words: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of `qedfs WORDS...`: a child that passes on signals, and whose command is forked."""
    return subprocess.Popen([*_client(), *map(str, words)], pass_fds=[_starter().fileno()], **options)


def _client() -> list[str]:
    client = _ROOT / "tests" / "harness" / "forked_program.py"
    return [sys.executable, "-I", "-S", str(client), str(_starter().fileno())]


def _read_all(fds: Sequence[int], deadline: float) -> list[bytes]:
    """What comes out of each pipe until its end."""
    printed = {fd: bytearray() for fd in fds}
    with selectors.DefaultSelector() as selector:
        for fd in fds:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0, deadline - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired("qedfs", 0)
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                printed[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
    return [bytes(printed[fd]) for fd in fds]


@functools.cache
def _starter() -> socket.socket:
    """The socket of this run's starter, which ends with the run."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**_others(os.environ), **_BEFORE, "PYTHONIOENCODING": "utf-8"},
            # A Ctrl-C reaches the commands by way of their tests.
            start_new_session=True,
        )
    atexit.register(_end, ours, process)
    return ours


def _others(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_INTERPRETER)}


def _end(requests: socket.socket, process: subprocess.Popen[bytes]) -> None:
    requests.shutdown(socket.SHUT_RDWR)  # a program that has inherited it may still run
    requests.close()
    process.wait()


class _Request(NamedTuple):
    """A command to become: the request's dict, and its stdin, stdout and stderr."""

    text: bytes
    streams: list[int]


def _serve(requests: socket.socket) -> _Request:
    """Forks for each request, and tells how its process ended. Only the forked processes return."""
    running: dict[int, tuple[int, int]] = {}  # pidfd: (pid, report)
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not requests:
                    pid, report = running.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _tell(report, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    os.close(report)
                    continue
                text, fds, _, _ = socket.recv_fds(requests, _MOST_BYTES, 4)
                if not text:
                    # The run has ended, perhaps in the middle of a test.
                    for pid, _ in running.values():
                        os.kill(pid, signal.SIGTERM)
                    os._exit(0)
                *streams, report = fds
                pid = os.fork()
                if pid == 0:
                    return _Request(text, streams)
                for fd in streams:
                    os.close(fd)
                _tell(report, pid)
                pidfd = os.pidfd_open(pid)
                running[pidfd] = (pid, report)
                selector.register(pidfd, selectors.EVENT_READ)


def _tell(report: int, number: int) -> None:
    # A test that has failed does not wait for the end.
    with contextlib.suppress(BrokenPipeError):
        os.write(report, _NUMBER.pack(number))


def _become(request: _Request) -> None:
    """Gives this process all that a new program would have been given."""
    wanted = ast.literal_eval(request.text.decode())
    if wanted["mounts_of"] is not None:
        _share_mounts(wanted["mounts_of"])
    _take(wanted["words"], request.streams, wanted["env"], wanted["cwd"])
    if wanted["session"]:
        os.setsid()


def _share_mounts(pid: int) -> None:
    fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), f"cannot have the mounts of process {pid}")


def _take(
    words: Sequence[str], streams: Sequence[int], environ: Mapping[str, str], cwd: str, kept: Sequence[int] = ()
) -> None:
    """Takes stdin, stdout and stderr from `streams`, and lets go of all other descriptors but those in `kept`."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    # The requests of other commands, and their reports.
    last = max(map(int, os.listdir("/proc/self/fd")))
    for first, end in itertools.pairwise([2, *sorted(kept), last + 1]):
        os.closerange(first + 1, end)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv = ["qedfs", *words]
    # Whether a stream can seek and is a terminal was asked when it was made.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        mode = "w" if number else "r"
        new = open(number, mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        if isinstance(new, io.TextIOWrapper):
            new.reconfigure(line_buffering=old.line_buffering or os.isatty(number))
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


class _Server:
    """What `qedfs mount --daemon` starts, in place of `subprocess.Popen`: a fork as well, and no new interpreter."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        stderr: BinaryIO,
        pass_fds: Sequence[int],
        **_streams_and_session: object,
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            null = os.open(os.devnull, os.O_RDWR)
            _take(argv[argv.index("qedfs") + 1 :], [null, null, stderr.fileno()], env, cwd, pass_fds)
            os.setsid()
            try:
                _run()
            except BaseException as end:
                # What is around this call is the business of the process that has forked.
                if isinstance(end, SystemExit) and isinstance(end.code, int):
                    os._exit(end.code)
                traceback.print_exc()
                os._exit(1)

    def wait(self, timeout: float | None = None) -> int:
        """As that of `Popen`."""
        fd = os.pidfd_open(self.pid)
        try:
            if not select.select([fd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("qedfs", timeout or 0)
        finally:
            os.close(fd)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def terminate(self) -> None:
        """As that of `Popen`."""
        os.kill(self.pid, signal.SIGTERM)


def _run() -> None:
    """Runs the command in `sys.argv`."""
    try:
        importlib.import_module("qedfs.cli.main").main()
    except SystemExit as end:
        _leave(end.code)
        raise


def _leave(status: object) -> None:
    """Ends the process as an interpreter does, but leaves its modules as they are: half of a command's processor time.

    To take them down would write to all that this process shares with the starter. Returns where more than that is to
    be done: a message for stderr, output that cannot be written.
    """
    if not isinstance(status, int | None):
        return
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    import qedfs
    from qedfs.cli import daemon

    # A command imports what it needs when it is used. For a mount these are 160 modules, half of its start.
    for _module in pkgutil.walk_packages(qedfs.__path__, "qedfs."):
        if _module.name != "qedfs.__main__":
            importlib.import_module(_module.name)
    vars(daemon)["subprocess"] = types.SimpleNamespace(**{**vars(subprocess), "Popen": _Server})
    _requests = socket.socket(fileno=int(sys.argv[1]))
    # What is imported stays, and stays shared.
    gc.freeze()
    _request = _serve(_requests)
    _requests.detach()
    _become(_request)
    _run()
