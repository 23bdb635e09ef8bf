"""A real QEMU without a guest system in it: its firmware idles. It migrates like any other, and starts at once."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness.process import Child
from tests.harness.require import require


class Bare:
    """A running QEMU and the sockets of its monitors; each takes one client at a time."""

    def __init__(self, child: Child, folder: Path) -> None:
        self._child = child
        self.monitor = str(folder / "qmp")
        self.second_monitor = str(folder / "qmp2")
        self.incoming = f"unix:{folder / 'incoming'}"

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def wait(self) -> int:
        return self._child.wait()

    def kill(self) -> None:
        self._child.kill()


@contextlib.contextmanager
def bare(*arguments: str, incoming: str | None = None) -> Iterator[Bare]:
    """Starts one with these arguments beside its own; it is killed when the block is left. `incoming`: as -incoming."""
    folder = Path(tempfile.mkdtemp(prefix="qedfs-"))
    argv: list[str] = [
        *(require("qemu-system-x86_64"), "-machine", "q35", "-accel", "tcg", "-m", "16", "-nodefaults"),
        *("-no-user-config", "-display", "none"),
        *("-qmp", f"unix:{folder / 'qmp'},server=on,wait=off", "-qmp", f"unix:{folder / 'qmp2'},server=on,wait=off"),
        *arguments,
        *(("-incoming", incoming) if incoming else ()),
    ]
    try:
        child = Child(argv, folder / "output")
        try:
            child.wait_until(lambda: all((folder / name).exists() for name in ("qmp", "qmp2")), "monitors")
            yield Bare(child, folder)
        finally:
            child.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
