"""A web server of disk images for the commands to work on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..harness.images import random_image
from ..harness.mounts import qedfs
from ..harness.servers import Nginx, nginx

SIZE = 4 << 20


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Nginx]:
    """nginx with /disk.img, SIZE bytes without a pattern."""
    root = tmp_path / "web"
    root.mkdir()
    random_image(root / "disk.img", SIZE)
    with nginx(root) as server:
        yield server


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The file behind /disk.img."""
    return tmp_path / "web" / "disk.img"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for overlays."""
    path = tmp_path / "overlays"
    path.mkdir()
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """A folder to mount on."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def overlay(web: Nginx, folder: Path) -> Path:
    """An empty overlay of /disk.img."""
    path = folder / "disk.qed"
    qedfs("create", path, "--backing", f"{web.url}/disk.img")
    return path
