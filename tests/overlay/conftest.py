"""QEMU's tools as a second opinion: small wrappers around `qemu-img` and `qemu-io`, and a backing for overlays."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness.hang import HANG_SECONDS
from tests.harness.require import require


class Qemu:
    """QEMU's tools in a folder of their own, which holds `base.raw`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str, fails: bool = False) -> str:
        """Run a tool; returns what it printed. `fails`: it must end with an error."""
        done = subprocess.run(
            arguments, cwd=self.folder, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
        )
        assert (done.returncode != 0) == fails, f"{arguments}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def make(self, name: str, size: int, *, cluster_size: int = 65536, table_size: int = 4) -> str:
        """An empty overlay; returns its path."""
        options = f"cluster_size={cluster_size},table_size={table_size}"
        base = ("-b", "base.raw", "-F", "raw")
        self.run("qemu-img", "create", "-q", "-f", "qed", "-o", options, *base, name, str(size))
        return str(self.folder / name)

    def io(self, name: str, *commands: str, read_only: bool = False, fails: bool = False) -> str:
        """Run qemu-io commands on an overlay. A pattern that does not match counts as a failure."""
        arguments = [argument for command in commands for argument in ("-c", command)]
        flags = ["-r"] if read_only else []
        text = self.run("qemu-io", *flags, "-f", "qed", *arguments, name, fails=fails)
        assert "verification failed" not in text, text
        return text

    def check(self, name: str) -> dict[str, Any]:
        """`qemu-img check`: corruptions are a failure, leaks are not."""
        arguments = ["qemu-img", "check", "-f", "qed", "--output=json", name]
        done = subprocess.run(
            arguments, cwd=self.folder, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
        )
        assert done.returncode in (0, 3), done.stdout + done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """qemu-io has the overlay open for writing while the context is open."""
        command = ["qemu-io", "-f", "qed", name]
        with subprocess.Popen(command, cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"read 0 512\n")
            process.stdin.flush()
            # It answers when it has opened the file.
            assert b"read 512" in process.stdout.readline()
            try:
                yield
            finally:
                process.communicate(b"quit\n", timeout=HANG_SECONDS)

    def raw(self, name: str) -> bytes:
        """The image as QEMU reads it."""
        self.run("qemu-img", "convert", "-f", "qed", "-O", "raw", name, "converted.raw")
        return (self.folder / "converted.raw").read_bytes()


@pytest.fixture
def qemu(tmp_path: Path) -> Qemu:
    require("qemu-io")
    return Qemu(tmp_path)


@pytest.fixture
def base(qemu: Qemu) -> bytes:
    """The backing `base.raw`: 1 MiB and a bit, with holes of zeros."""
    rng = random.Random(7)
    data = b"".join(bytes(8192) if rng.random() < 0.3 else rng.randbytes(8192) for _ in range(130))[:-700]
    (qemu.folder / "base.raw").write_bytes(data)
    return data
