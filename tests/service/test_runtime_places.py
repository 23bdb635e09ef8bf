"""The server of a mount is found from a service and from a login session, by any name, and also if it stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qedfs.cli.mount_table import mounted_type
from qedfs.host.runtime import place_of
from tests.harness.hang import HANG_OPTION, HANG_SECONDS
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require_root
from tests.mount.support import MIB, create, origin


def test_a_service_is_found_from_a_login_session(tmp_path: Path) -> None:
    require_root()
    session = tmp_path / "session"
    session.mkdir()
    with origin(tmp_path, MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt") as mount:
            qedfs("wait", mount.mountpoint, "--timeout", HANG_OPTION, env={"XDG_RUNTIME_DIR": str(session)})
            assert mount.unmount() == 0
    assert list(session.iterdir()) == []


def test_a_mountpoint_that_is_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link"
    (tmp_path / "mnt").mkdir()
    link.symlink_to("mnt")
    with origin(tmp_path, MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, link) as mount:
            qedfs("wait", link, "--timeout", HANG_OPTION)
            assert qedfs("status", link).stdout == qedfs("status", tmp_path / "mnt").stdout
            qedfs("umount", link)
            assert mount.wait_exit() == 0


def test_a_server_that_stands_still_is_unmounted(tmp_path: Path) -> None:
    with origin(tmp_path, MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            wait_for(lambda: "serving" in mount.output(), "the control socket")
            os.kill(mount.pid, signal.SIGSTOP)
            time.sleep(2.5)  # longer than the kernel keeps the attributes
            assert qedfs("wait", mount.mountpoint, "--timeout", "1s", check=False).returncode == 7
            umount = subprocess.Popen([sys.executable, "-m", "qedfs", "umount", mount.mountpoint])
            try:
                wait_for(lambda: mounted_type(str(mount.mountpoint)) is None, "the end of the mount")
                assert umount.poll() is None
                os.kill(mount.pid, signal.SIGCONT)
                assert umount.wait(HANG_SECONDS) == 0
                assert mount.wait_exit() == 0
            finally:
                umount.kill()
                umount.wait()


@pytest.mark.parametrize(
    "name", ["a/mnt", "link", "folder/mnt", "link/", "a/../link", "chain", "up", "up/x", "loop", "none", "root", ""]
)
def test_a_place_is_that_of_realpath(tmp_path: Path, name: str) -> None:
    (tmp_path / "a" / "mnt" / "x").mkdir(parents=True)
    (tmp_path / "folder").symlink_to("a")
    (tmp_path / "link").symlink_to("folder/mnt/")
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    (tmp_path / "up").symlink_to("a/mnt/..")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "root").symlink_to("/")
    assert place_of(f"{tmp_path}/{name}") == os.path.realpath(os.path.abspath(f"{tmp_path}/{name}"))
