"""Standby and cut-over on a mount whose server dies and is replaced by another one: `mount --restart`."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

from tests.harness.mounts import mounted

from .outlives import kill_server, wait_for_takeover
from .standby import SIZE, activate, change, raw, served
from .support import MIB, create, opened, read_direct

__all__ = ["raw"]  # a fixture


def test_the_next_server_of_a_mount_goes_on_with_the_standby_and_after_the_cut_over(tmp_path: Path, raw: Path) -> None:
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt", "--restart", "--limit", "1M") as mount:
            path = mount.path("disk.raw")
            with opened(path) as fd:
                assert os.pread(fd, SIZE, 0) == raw.read_bytes()
                kill_server(mount)
                wait_for_takeover(mount, 1)
                assert mount.image()["state"] == "standby"
                content = change(raw)
                assert activate(mount) == 0
                assert os.pread(fd, MIB, 0) == content[:MIB]
                kill_server(mount)
                wait_for_takeover(mount, 2)
                assert mount.image()["state"] != "standby"
                assert activate(mount, "--undo") == 0
                content = change(raw, seed=3)
                assert os.pread(fd, SIZE, 0) == read_direct(path, 0, SIZE) == content


# In place of the program that opens the image, so that the kernel drops its pages: the first call kills who has called.
KILLER = """#!/bin/sh
if mv {flag} {flag}.used 2>/dev/null; then kill -9 $PPID; fi
exec {head} "$@"
"""


def test_a_kill_between_the_record_and_the_drop_of_the_pages_leaves_no_stale_page(tmp_path: Path, raw: Path) -> None:
    programs, flag = tmp_path / "bin", tmp_path / "flag"
    programs.mkdir()
    (programs / "head").write_text(KILLER.format(flag=flag, head=shutil.which("head")))
    (programs / "head").chmod(0o755)
    flag.touch()
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    with served(raw) as server:
        overlay = create(tmp_path / "disk.qed", server.url, "--standby")
        with mounted(overlay, tmp_path / "mnt", "--restart", "--no-stream", env=env) as mount:
            path = mount.path("disk.raw")
            with opened(path) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
                assert os.pread(fd, SIZE, 0) == mapped[:] == raw.read_bytes()
                content = change(raw)
                assert activate(mount) != 0
                assert not flag.exists()
                wait_for_takeover(mount, 1)
                assert mount.image()["state"] == "off"  # active, as its record says
                assert activate(mount) == 0  # as whoever got no answer has to ask again
                assert mapped[:] == os.pread(fd, SIZE, 0) == read_direct(path, 0, SIZE) == content
