"""The real command line: `python -m qedfs` in a process of its own, and mounts that end with their test."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qedfs.control.qmp.client import Client

from .hang import HANG_OPTION, HANG_SECONDS
from .process import QEDFS, Child, Command, Died, wait_for
from .require import require, require_fuse
from .starter import needs_interpreter, run

_OCTAL = re.compile(rb"\\([0-7]{3})")

# Mounts that serve now, for `kill_all`.
_running: list[Mount] = []

# A command with a `--timeout` of HANG_SECONDS ends by itself first, and says what it waited for.
COMMAND_SECONDS = HANG_SECONDS + 10


def qedfs(
    *args: str | Path,
    check: bool = True,
    timeout_seconds: float = COMMAND_SECONDS,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end.

    Raises:
        RuntimeError: `check` is true and the exit code is not 0; the message holds what was printed.
        subprocess.TimeoutExpired: it did not end in time; it was killed.
    """
    words = [os.fspath(arg) for arg in args]
    environ = {**os.environ, **(env or {})}
    if needs_interpreter(environ):
        done = subprocess.run(
            [*QEDFS, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_seconds,
            stdin=subprocess.DEVNULL,
            env=environ,
        )
    else:
        done = run(words, timeout_seconds=timeout_seconds, environ=environ)
    if check and done.returncode != 0:
        raise RuntimeError(f"qedfs {' '.join(words)}: exit code {done.returncode}\n{done.stderr}{done.stdout}")
    return done


class Mount:
    """A running `qedfs mount` in the foreground."""

    def __init__(self, mountpoint: Path, child: Child) -> None:
        self.mountpoint = mountpoint
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it serves."""
        return self._child.returncode

    def path(self, name: str) -> Path:
        """The served image `name` ("disk.raw")."""
        return self.mountpoint / name

    def output(self) -> str:
        """All that the process printed so far: its log."""
        return self._child.output()

    def status(self) -> dict[str, Any]:
        """The object that `qedfs status --json` prints, asked for without starting a program: tests look often."""
        with Client.connect(str(self.mountpoint)) as client:
            status: dict[str, Any] = client.execute("x-qedfs-status")
        return status

    def image(self, name: str | None = None) -> dict[str, Any]:
        """One image's entry in the status; without a name, that of the only image."""
        images: list[dict[str, Any]] = self.status()["images"]
        found = [image for image in images if name in (None, image["name"])]
        if len(found) != 1:
            raise LookupError(f"{name or 'one image'} among {[image['name'] for image in images]}")
        return found[0]

    def wait(self, *image: str, timeout: str = HANG_OPTION) -> None:
        """Waits until the image, or every image, is complete (`qedfs wait`).

        Raises:
            RuntimeError: it failed or took longer than `timeout` (a duration as the command line takes it).
        """
        qedfs("wait", self.mountpoint, *image, "--timeout", timeout)

    def unmount(self) -> int:
        """`qedfs umount`, then the exit code of the mounting process, which has ended."""
        qedfs("umount", self.mountpoint)
        return self._child.wait()

    def wait_exit(self, timeout_seconds: float = COMMAND_SECONDS) -> int:
        """Waits for the process to end by itself (`--until-streamed`, a signal); returns its exit code."""
        return self._child.wait(timeout_seconds)

    def kill(self) -> None:
        """SIGKILL, as a crash: nothing is written back. The dead mount is detached."""
        self._child.kill()
        _detach(self.mountpoint)

    def close(self) -> None:
        """Makes sure that neither the mount nor its process is there any more, whatever state they are in."""
        # SIGTERM is the orderly end; it also works when the control socket does not.
        self._child.stop()
        _detach(self.mountpoint)


@contextlib.contextmanager
def mounted(
    source: Path,
    mountpoint: Path,
    *options: str | Path,
    env: Mapping[str, str] | None = None,
    through: Sequence[str | Path] = (),
    own_interpreter: bool = False,
) -> Iterator[Mount]:
    """Mounts an overlay or a folder of them, for the length of the block; `mountpoint` is made if it is not there.

    Without a holder, unless the options say `--restart`: a test looks at the process that serves, and kills it.

    `through`: a command that runs another one, and its options. `own_interpreter`: nothing is forked from the starter,
    for a test that looks at the process from outside (its words in /proc).

    Raises:
        Died: the mount never came up; the message holds what the process printed.
    """
    require_fuse()
    mountpoint.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="qedfs-"))
    outside = mountpoint.stat().st_dev
    try:
        held = not {"--restart", "--no-restart"}.isdisjoint(options)
        words: list[str | Path] = ["mount", source, mountpoint, *options, *([] if held else ["--no-restart"])]
        log = folder / "output"
        child = (
            Child([*through, *QEDFS, *words], log, env=env)
            if through or own_interpreter
            else Command(words, log, env=env)
        )
        mount = Mount(mountpoint, child)
        try:
            _running.append(mount)
            child.wait_until(lambda: is_mounted(mountpoint, outside), f"a mount at {mountpoint}")
            yield mount
        except BaseException:
            # pytest shows it with the failure.
            print(f"log of the mount at {mountpoint}:\n{mount.output()}")
            raise
        finally:
            _running.remove(mount)
            mount.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kill_all() -> None:
    """SIGKILL to every mount that `mounted` serves: whoever waits for one of them gets an error. From any thread."""
    for mount in tuple(_running):
        os.kill(mount.pid, signal.SIGKILL)


def is_mounted(mountpoint: Path, outside: int | None = None) -> bool:
    """Whether a file system is mounted at `mountpoint`; `outside` is the device number of the folder below it."""
    if outside is None:
        outside = mountpoint.parent.stat().st_dev
    try:
        return mountpoint.stat().st_dev != outside
    except OSError:
        # A mount whose process is dead (ENOTCONN) is still a mount, but not one that serves.
        return False


def _detach(mountpoint: Path) -> None:
    # Lazily: a reader that still has a file open must not keep the test from ending.
    if not _in_mount_table(mountpoint):
        return
    argv = [require("fusermount3"), "-u", "-z", "-q", str(mountpoint)]
    if os.geteuid() == 0:
        argv = [require("umount"), "--lazy", str(mountpoint)]
    subprocess.run(argv, check=False, capture_output=True)
    wait_for(lambda: not _in_mount_table(mountpoint), f"end of the mount at {mountpoint}")


def _in_mount_table(mountpoint: Path) -> bool:
    # Field 5 of /proc/self/mountinfo, proc(5); stat() on a dead or stuck mount may not return. Bytes and single blanks:
    # other tests mount at paths that hold every other character.
    fields = [line.split(b" ") for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")]
    places = [_OCTAL.sub(lambda octal: bytes([int(octal[1], 8)]), field[4]) for field in fields if len(field) > 4]
    return os.fsencode(mountpoint.absolute()) in places


__all__ = ["COMMAND_SECONDS", "Died", "Mount", "is_mounted", "kill_all", "mounted", "qedfs"]
