"""Mounts in standby, for their tests: the source, whose machine still changes its disk, and the cut-over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.images import random_image
from tests.harness.mounts import Mount, qedfs
from tests.harness.servers import Server, qemu_nbd

from .support import CLUSTER_SIZE, MIB, opened

SIZE = 16 * MIB


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return random_image(tmp_path / "disk", SIZE, seed=1)


@contextlib.contextmanager
def served(raw: Path) -> Iterator[Server]:
    # It reads the file for each request, so that changes of it show at once. Not nbdkit: 1.32 can abort when a client
    # that it answers is killed (connections.c: "Assertion `sock >= 0' failed").
    with qemu_nbd(raw, tcp=True) as server:
        yield server


def change(raw: Path, seed: int = 2) -> bytes:
    """The machine at the source writes to every sector of its disk. Returns the new content."""
    content = random_image(raw.with_suffix(".new"), SIZE, seed=seed).read_bytes()
    with opened(raw) as fd:
        os.pwrite(fd, content, 0)
    return content


def tables_and_data(overlay: Path) -> bytes:
    """All of an overlay but its header, where the record is."""
    return overlay.read_bytes()[CLUSTER_SIZE:]


def activate(mount: Mount, *options: str) -> int:
    return qedfs("activate", mount.mountpoint, *options, check=False).returncode
