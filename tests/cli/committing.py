"""Overlays to commit into their backing, and what the command says about them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.harness.images import qemu_io, random_image
from tests.harness.mounts import qedfs

MIB = 1 << 20
WRITES = (
    "write -P 7 100k 200k",
    "write -z 1M 512k",
    "write -P 9 10M 64k",
    "write -z 11M 64k",
    "write -P 5 12581888 512",
)
SIZE = 12 * MIB - 512


def overlay_over(folder: Path, fmt: str = "raw") -> Path:
    """An overlay with data, zeros and nothing, larger than its backing of 8 MiB."""
    folder.mkdir(exist_ok=True)
    raw = random_image(folder / "base", 8 * MIB)
    if fmt == "qed":
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qed", raw, folder / "base.qed"], check=True)
        (folder / "base.qed").rename(raw)
    overlay = folder / "disk.qed"
    words: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qed", "-b", "base", "-F", fmt, overlay, str(SIZE)]
    subprocess.run(words, check=True, cwd=folder)
    qemu_io(overlay, *WRITES)
    return overlay


def commit(overlay: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return qedfs("commit", overlay, "--allow-backing", overlay.parent, *options, check=False)


def refused(done: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert text in done.stderr
