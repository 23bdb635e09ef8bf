"""A mount takes as many open files as it may have."""

from __future__ import annotations

import resource
from pathlib import Path

from tests.harness.mounts import mounted

from .support import create


def test_the_soft_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    overlay = create(tmp_path / "disk.qed", "http://127.0.0.1:9/disk", "--size", "1M")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            assert resource.prlimit(mount.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
