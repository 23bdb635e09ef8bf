"""A fault at every system call of a session with the real mount, one after the other, and what is left each time.

After the session with its fault: the tables have no damage; the image mounts again and reads as every write that
returned, over the backing; and the overlay goes on to its end, where QEMU finds it sound, complete and equal.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qedfs.overlay.check import check
from qedfs.overlay.create import create_overlay
from qedfs.overlay.session import read_header
from qedfs.overlay.storage import FileStorage
from tests.faults.session import CLUSTER_SIZE, IMAGE_SIZE, Expectation, Session, Wrong
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_check, qemu_info, qemu_same
from tests.harness.mounts import Mount, is_mounted, mounted
from tests.harness.process import Child, Died
from tests.harness.require import require

PATIENCE_SECONDS = 2 * HANG_SECONDS
FAULTY_STREAM_SECONDS = 5.0  # for a stream with a fault; none has to end
SYSCALLS = ("pwrite64", "pwritev2", "fdatasync", "ftruncate")
STRACE_ACTIONS = {"kill": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}


class Fault(NamedTuple):
    """What happens to the `number`-th call. `syscall`: by strace, among the calls of this kind of each thread."""

    number: int
    action: str
    syscall: str = ""

    def __str__(self) -> str:
        where = f"{self.syscall} of a thread" if self.syscall else "call"
        return f"{self.action} at {where} {self.number}"


class Result(NamedTuple):
    """What one session with its fault came to."""

    fault: Fault
    hit: bool  # whether the session came as far as the fault
    calls: int  # how many there were, as far as that is known
    killed: bool
    failed: list[str]  # operations of the session that failed
    leaks: int


class Bench:
    """A folder with a backing; each `run` is a fresh overlay."""

    def __init__(self, folder: Path, *, seed: int = 0) -> None:
        self._folder = folder
        self._seed = seed
        # Two thirds of the clusters hold data: the rest become zero clusters.
        source = random.Random(seed)
        clusters = (
            bytes(CLUSTER_SIZE) if source.random() < 0.3 else source.randbytes(CLUSTER_SIZE) for _ in range(2000)
        )
        self._content = b"".join(clusters)[: IMAGE_SIZE - 5000]
        self._backing = folder / "backing.raw"
        self._backing.write_bytes(self._content)
        self._overlay = folder / "disk.qed"
        self._mountpoint = folder / "mnt"
        self._mountpoint.mkdir()
        self._child: Child | None = None

    def close(self) -> None:
        """Leave no process and no mount, wherever a run was interrupted."""
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
        _umount("-l", self._mountpoint)

    def run(self, fault: Fault) -> Result:
        """One session. Raises Wrong if a promise does not hold; the message begins with the fault."""
        try:
            return self._run(fault)
        except (AssertionError, Died, OSError, subprocess.TimeoutExpired) as exc:
            raise Wrong(f"{fault}: {exc}") from exc

    def _run(self, fault: Fault) -> Result:
        for orphan in self._folder.glob("disk*"):
            orphan.unlink()
        create_overlay(
            str(self._overlay),
            image_size=IMAGE_SIZE,
            backing=str(self._backing),
            cluster_size=CLUSTER_SIZE,
            table_size=2,
        )
        expectation = Expectation(self._content.ljust(IMAGE_SIZE, b"\0"))
        hit, calls, code, failed = self._session(fault, expectation)
        leaks = self._check()
        self._finish(expectation)
        return Result(fault, hit, calls, code == -9, failed, leaks)

    def _session(self, fault: Fault, expectation: Expectation) -> tuple[bool, int, int, list[str]]:
        record = self._folder / "disk.calls"
        record.touch()
        # Without a holder, which would start another server after a kill: the sweep looks at what the first one left.
        options = ("--no-stream", "--no-restart", "--allow-backing", self._folder, "--source-timeout", "2s")
        arguments = ("mount", self._overlay, self._mountpoint, *options)
        child = self._child = Child([*_command(fault, record), *arguments], self._folder / "disk.log")
        session = Session(self._mountpoint, expectation, seed=self._seed, stream_seconds=FAULTY_STREAM_SECONDS)
        try:
            with _patience(child), contextlib.suppress(Died):
                child.wait_until(lambda: is_mounted(self._mountpoint), "a mount")
                session.run()
            code = self._end(child)
        except BaseException:
            # An interruption, too, must come out of here as what it is.
            self.close()
            raise
        if "internal error" in child.output() or "Traceback" in child.output():
            raise Wrong(f"the mount has met a fault of its own:\n{child.output()}")
        if "read-only until it is opened again" in child.output():
            expectation.barrier_failed()
        if fault.syscall:
            log = record.read_text(errors="replace")
            return "INJECTED" in log or code == -9, log.count("\n"), code, session.failed
        calls = int(record.read_text() or 0)
        if code != -9 and not calls:
            raise Wrong(f"the mount ended with {code} before it wrote anything:\n{child.output()}")
        return code == -9 or calls >= fault.number, calls, code, session.failed

    def _end(self, child: Child) -> int:
        """Unmount and return the exit code; a process that has died leaves a mount that is detached."""
        failed = _umount(self._mountpoint)
        code = child.wait()
        if failed:
            _umount("-l", self._mountpoint)
        return code

    def _check(self) -> int:
        """The tables as the fault has left them, before anybody repairs or replays; returns the leaks."""
        storage = FileStorage.open(str(self._overlay), writable=False)
        try:
            report = check(storage, read_header(storage)[0])
        finally:
            storage.close()
        if report.corruptions:
            raise Wrong(f"{report.corruptions} corruptions, the first: {report.first_problem}")
        return report.leaks

    def _finish(self, expectation: Expectation) -> None:
        """Mount again, compare, go on with the overlay to its end, let QEMU judge it."""
        options = ("--no-stream", "--allow-backing", self._folder)
        with mounted(self._overlay, self._mountpoint, *options) as mount, _patience(mount):
            expectation.settle(mount.path("disk.raw").read_bytes())
            session = Session(self._mountpoint, expectation, seed=self._seed + 1)
            session.run()
            if session.failed:
                raise Wrong(f"the session after the fault failed: {session.failed}\n{mount.output()}")
            _umount(self._mountpoint)
            if mount.wait_exit() != 0:
                raise Wrong(f"the mount after the fault did not end well:\n{mount.output()}")
        (final,) = expectation.versions
        expected = self._folder / "disk.expected"
        expected.write_bytes(final)
        if qemu_check(self._overlay).corruptions:
            raise Wrong("qemu-img check finds corruptions")
        if "backing-filename" in qemu_info(self._overlay):
            raise Wrong("the overlay still has its backing")
        if not qemu_same(self._overlay, expected):
            raise Wrong("the overlay is not equal to what was written")


def _umount(*arguments: str | Path) -> int:
    """Run umount; returns its exit code."""
    argv: list[str | Path] = [require("umount"), *arguments]
    return subprocess.run(argv, capture_output=True, check=False, timeout=HANG_SECONDS).returncode


def _command(fault: Fault, record: Path) -> list[str | Path]:
    if not fault.syscall:
        return [sys.executable, "-m", "tests.faults.inject", record, str(fault.number), fault.action]
    what = f"inject={fault.syscall}:{STRACE_ACTIONS[fault.action]}:when={fault.number}"
    # -D: the process that we started is the mount, and strace looks on.
    strace: list[str | Path] = [require("strace"), "-D", "-f", "-qq", "-o", record]
    return [*strace, "-e", f"trace={fault.syscall}", "-e", what, sys.executable, "-m", "qedfs"]


@contextlib.contextmanager
def _patience(process: Child | Mount) -> Iterator[None]:
    """Kill a mount on which something hangs: whoever waits for it gets an error."""
    timer = threading.Timer(PATIENCE_SECONDS, os.kill, (process.pid, 9))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
