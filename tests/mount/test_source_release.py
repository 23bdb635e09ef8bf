"""The connections to a source that no overlay needs any more are closed, so that its server can stop."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.harness.images import random_image
from tests.harness.process import wait_for
from tests.harness.servers import nbdkit
from tests.mount.support import MIB, mounted_over


def test_no_connection_is_left_when_the_last_overlay_is_complete(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "raw", 16 * MIB)
    with nbdkit("file", raw, tcp=True) as server, mounted_over(tmp_path, server.url) as mount:
        mount.wait()
        process = psutil.Process(mount.pid)
        wait_for(lambda: not process.net_connections("tcp"), "the end of the connections")
        assert mount.path("disk.raw").read_bytes() == raw.read_bytes()
