"""Image files for tests, and what QEMU's own tools say about them."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .require import require

_CHUNK_SIZE = 1 << 20
# QEMU 10.0's own HTTP client waits for ever now and then (Debian 13: 1 of 4 comparisons over HTTP, no request under
# way).
# To compare changes nothing, so it is begun anew. A second is what it takes; all tries end before pytest's watchdog.
COMPARE_SECONDS = 30.0
COMPARE_TRIES = 3


def random_image(path: Path, size: int, *, seed: int = 0) -> Path:
    """Writes `size` bytes without a pattern; the same seed gives the same bytes."""
    source = random.Random(seed)
    with path.open("wb") as file:
        for pos in range(0, size, _CHUNK_SIZE):
            file.write(source.randbytes(min(_CHUNK_SIZE, size - pos)))
    return path


def sparse_image(path: Path, size: int, parts: dict[int, bytes] | None = None) -> Path:
    """Makes a file of `size` bytes that is a hole except for `parts`, bytes by position."""
    with path.open("wb") as file:
        file.truncate(size)
        for pos, data in (parts or {}).items():
            os.pwrite(file.fileno(), data, pos)
    return path


def ext4_image(path: Path, size: int, folder: Path) -> Path:
    """Makes an ext4 file system of `size` bytes that holds a copy of `folder`; no root needed."""
    sparse_image(path, size)
    _run([require("mkfs.ext4"), "-q", "-F", "-d", folder, path])
    return path


def first_difference(one: Path, other: Path) -> int | None:
    """The position of the first byte in which two files differ, the end of the shorter one included; None if equal."""
    with one.open("rb") as left, other.open("rb") as right:
        pos = 0
        while True:
            a, b = left.read(_CHUNK_SIZE), right.read(_CHUNK_SIZE)
            if a != b:
                common = min(len(a), len(b))
                return pos + next((i for i in range(common) if a[i] != b[i]), common)
            if not a:
                return None
            pos += len(a)


class Check(NamedTuple):
    """What `qemu-img check` counted."""

    corruptions: int
    leaks: int


def qemu_check(image: Path, fmt: str = "qed") -> Check:
    """Checks an image that nobody has open; nothing is repaired.

    Raises:
        RuntimeError: QEMU could not check it (not an image, a read error).
    """
    done = subprocess.run(
        [require("qemu-img"), "check", "--output=json", "-f", fmt, image], capture_output=True, text=True, check=False
    )
    # 2: corruptions, 3: leaks; both come with the report.
    if done.returncode not in (0, 2, 3):
        raise RuntimeError(f"qemu-img check {image}: exit code {done.returncode}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    return Check(report.get("corruptions", 0), report.get("leaks", 0))


def qemu_same(one: Path | str, other: Path | str, *, fmt: str = "qed", other_fmt: str = "raw") -> bool:
    """Whether two images read the same (`qemu-img compare`); zeros past the end of the shorter one count as equal.

    Raises:
        RuntimeError: one of them could not be read.
    """
    words = [require("qemu-img"), "compare", "-q", "-f", fmt, "-F", other_fmt, one, other]
    for _ in range(COMPARE_TRIES):
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=COMPARE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        if done.returncode not in (0, 1):
            raise RuntimeError(f"qemu-img compare {one} {other}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.returncode == 0
    raise RuntimeError(f"qemu-img compare {one} {other}: hung {COMPARE_TRIES} times")


def qemu_info(image: Path) -> dict[str, object]:
    """The object that `qemu-img info --output=json` prints, of this image alone."""
    info: dict[str, object] = json.loads(_run([require("qemu-img"), "info", "--output=json", image]))
    return info


def qemu_create(overlay: Path, backing: Path | str | None = None, *, size: int | None = None, **options: str) -> Path:
    """Makes a QED file with QEMU: `qemu_create(path, raw, cluster_size="4k")`."""
    argv: list[str | Path] = [require("qemu-img"), "create", "-q", "-f", "qed"]
    if options:
        argv += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
    if backing is not None:
        argv += ["-b", backing, "-F", "raw"]
    _run([*argv, overlay, *([] if size is None else [str(size)])])
    return overlay


def qemu_io(image: Path, *commands: str, fmt: str = "qed") -> str:
    """Runs qemu-io's commands on an image (`"write -P 7 64k 64k"`) and returns what it printed.

    Raises:
        RuntimeError: a command failed, or a pattern did not match.
    """
    argv: list[str | Path] = [require("qemu-io"), "-f", fmt]
    for command in commands:
        argv += ["-c", command]
    return _run([*argv, image])


def _run(argv: Sequence[str | Path]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = " ".join(str(arg) for arg in argv)
        raise RuntimeError(f"{words}: exit code {done.returncode}: {done.stderr.strip()} {done.stdout.strip()}")
    return done.stdout
