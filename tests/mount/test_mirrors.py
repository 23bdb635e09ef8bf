"""A mirror that loses the file, or dies, holds a stream up until the origin knows another one; it does not end it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qedfs.control.qmp.client import Client
from tests.fakes.http_server import FakeHttpServer
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.mount.support import MIB

CONTENT = random.Random(12).randbytes(4 * MIB)


def state(mount: Mount) -> tuple[str, str]:
    with Client.connect(str(mount.mountpoint)) as client:
        (image,) = client.execute("x-qedfs-status")["images"]
    return image["state"], image["error"] or ""


@pytest.mark.parametrize(
    "trouble", ["status-404", pytest.param("ignore-range", marks=pytest.mark.slow), "close-at-once"]
)
def test_a_stream_survives_its_mirror(tmp_path: Path, trouble: str) -> None:
    overlay = tmp_path / "disk.qed"
    with FakeHttpServer(CONTENT) as origin, FakeHttpServer(CONTENT) as one, FakeHttpServer(CONTENT) as other:
        origin.behaviour, origin.redirect_to = "redirect-302", one.url("/a")
        qedfs("create", overlay, "--backing", origin.url())
        asked = len(one.requests)
        # The deadline is longer than the pause before a range is asked for again, so that the error says what is wrong.
        with mounted(overlay, tmp_path / "mnt", "--limit", "2M", "--source-timeout", "3s") as mount:
            wait_for(lambda: len(one.requests) > asked + 2, "the stream to begin")
            one.behaviour = trouble
            # The origin has been asked, and knew no better.
            wait_for(
                lambda: state(mount)[0] == "waiting" and state(mount)[1] != "", "the stream to wait for the source"
            )
            assert "/a" in state(mount)[1]
            origin.redirect_to = other.url("/b")
            qedfs("wait", mount.mountpoint, timeout_seconds=HANG_SECONDS)
            assert mount.path("disk.raw").read_bytes() == CONTENT
            qedfs("umount", mount.mountpoint)
    assert other.requests
