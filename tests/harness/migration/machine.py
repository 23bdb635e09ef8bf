"""A QEMU process with the writing guest in it, or one that waits for a migration to come in.

The guest is `tests/harness/guest.py`'s kernel with another program: `writer.c`, which is compiled here.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qedfs.control.qmp.qemu import QemuClient
from tests.harness.guest import FAILED, initramfs
from tests.harness.hang import HANG_SECONDS
from tests.harness.process import Child, Died
from tests.harness.require import GUEST_FOLDER, require, require_guest

from .disk import SMALL, Layout

DONE = "GUEST-DONE"
MEMORY_MIB = 80  # with less, the kernel of the guest has no room to unpack its initramfs

_INIT = f"""#!/bin/busybox sh
fail() {{ echo "{FAILED}: $1"; busybox poweroff -f; }}
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
for module in $(busybox cat /modules/order); do busybox insmod /modules/$module || fail "insmod $module"; done
tries=0
while [ ! -b /dev/vda ]; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || fail "no /dev/vda"
    busybox sleep 0.1
done
busybox mount -t ext4 /dev/vda /mnt || fail "mount"
busybox stty -echo
work=$(busybox sed 's/.*qedfs.work=\\([^ ]*\\).*/\\1/' /proc/cmdline)
/writer /dev/vda $(echo $work | busybox tr , ' ') /mnt || fail "writer"
busybox umount /mnt || fail "umount"
echo {DONE}
busybox poweroff -f
"""


class Rate(NamedTuple):
    """One line of the guest's figures: all are sums since its start."""

    seconds: float  # time.monotonic() when it arrived
    writes: int
    reads: int
    files: int
    errors: int
    stale: int


class Machine:
    """A running QEMU, its QMP and its console."""

    def __init__(self, child: Child, folder: Path) -> None:
        self._child = child
        self.qmp_path = folder / "qmp"
        self.client_path = folder / "qmp2"  # for whoever drives it beside the test
        self._console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._console.connect(str(folder / "console"))
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read_console, daemon=True)
        self._reader.start()
        self.qmp = QemuClient.at(str(self.qmp_path))
        self.history: list[dict[str, Any]] = []  # events that were waited for or passed by

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def output(self) -> str:
        """What QEMU said itself, and the console."""
        return self._child.output() + "\n".join(line for _, line in self.lines)

    def rates(self) -> list[Rate]:
        """The guest's figures so far."""
        words = [(at, line.split()) for at, line in self.lines if line.startswith("RATE ")]
        return [Rate(at, *map(int, line[1:])) for at, line in words if len(line) == len(Rate._fields)]

    def said(self, start: str) -> str | None:
        """The first line of the console that begins so."""
        return next((line for _, line in self.lines if line.startswith(start)), None)

    def wait_working(self, writes: int = 1) -> None:
        """Waits until the guest of this machine has written so many more blocks than when it was last seen."""
        before = (self.rates() or [Rate(0, 0, 0, 0, 0, 0)])[-1].writes
        self._wait(lambda: bool(self.rates()) and self.rates()[-1].writes >= before + writes, "a guest that writes")

    def finish(self) -> int:
        """Tells the guest to stop writing and to end; returns the checksum of its table of versions.

        Raises:
            AssertionError: the guest read something stale, or failed.
        """
        self._console.sendall(b"stop\n")
        try:
            self._wait(lambda: self.said(DONE) is not None, "the end of the guest")
        except Died:
            # QEMU ends when the guest powers off, which may be before all that it said was read here.
            self._reader.join(HANG_SECONDS)
            if self.said(DONE) is None:
                raise
        table = self.said("TABLE ")
        assert table is not None, self.output()
        return int(table.split()[1])

    def status(self) -> str:
        """QEMU's run state: "running", "paused", "inmigrate", "io-error"."""
        status: str = self.qmp.execute("query-status")["status"]
        return status

    def close(self) -> None:
        """Ends QEMU, as if its power cord was pulled."""
        self.qmp.close()
        self._child.kill()
        self._reader.join(HANG_SECONDS)
        self._console.close()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            if (failed := self.said(FAILED)) is not None:
                raise AssertionError(f"{failed}\n{self.output()}")
            return ready()

        try:
            self._child.wait_until(look, what)
        except (AssertionError, Died):
            print(self.output())
            raise

    def _read_console(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := self._console.recv(65536):
                *lines, rest = (rest + data).split(b"\n")
                now = time.monotonic()
                self.lines += [(now, line.decode(errors="replace").rstrip("\r")) for line in lines]


@contextlib.contextmanager
def machine(
    drive: Sequence[str],
    *,
    layout: Layout = SMALL,
    incoming: bool = False,
    pause_us: int = 500,
    qemu: str | None = None,
    memory_mib: int = MEMORY_MIB,
) -> Iterator[Machine]:
    """Starts QEMU with a disk (`drive`: its arguments); it is killed when the block is left.

    `incoming`: it waits for `migrate-incoming`. `pause_us`: between two writes of each of the guest's writers.
    """
    folder = Path(tempfile.mkdtemp(prefix="qedfs-"))
    work = f"qedfs.work={layout.fs_size},{layout.blocks},{pause_us}"
    argv: list[str] = [
        *(qemu or require_guest(), "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(memory_mib), "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-kernel", str(GUEST_FOLDER / "vmlinuz"), "-initrd", str(initramfs(_INIT, (("writer", _writer()),)))),
        *("-append", f"console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on {work}"),
        *("-chardev", f"socket,id=console,path={folder / 'console'},server=on,wait=off", "-serial", "chardev:console"),
        *("-qmp", f"unix:{folder / 'qmp'},server=on,wait=off", "-qmp", f"unix:{folder / 'qmp2'},server=on,wait=off"),
        *drive,
        *(("-incoming", "defer") if incoming else ()),
    ]
    try:
        child = Child(argv, folder / "output")
        try:
            sockets = [folder / name for name in ("console", "qmp", "qmp2")]
            child.wait_until(lambda: all(path.exists() for path in sockets), "its sockets")
            running = Machine(child, folder)
        except BaseException:
            child.kill()
            raise
        try:
            yield running
        finally:
            running.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _writer() -> bytes:
    """The guest's program."""
    source = Path(__file__).with_name("writer.c")
    with tempfile.TemporaryDirectory(prefix="qedfs-") as folder:
        out = Path(folder) / "writer"
        subprocess.run([require("gcc"), "-static", "-O2", "-o", out, source], check=True)
        return out.read_bytes()
