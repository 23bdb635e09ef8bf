"""A mount with a holder whose servers die in the worst ways: of memory, hanging, handing over, under a guest."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.harness import guest
from tests.harness.cgroup import inside, limited
from tests.harness.images import random_image
from tests.harness.mounts import Mount, mounted
from tests.harness.process import wait_for
from tests.harness.servers import nginx

from .outlives import Broken, kill_server, loaded, paused_seconds, servers, wait_for_takeover, wait_until_serving
from .support import MIB, create, mounted_over, opened, origin

OOM_KILLS = 2


def test_the_out_of_memory_killer_takes_the_server_and_nobody_notices(tmp_path: Path) -> None:
    with (
        limited(1024 * MIB) as group,
        loaded(tmp_path, "--most-deaths", "100", size=8 * MIB, through=inside(group)) as (mount, load),
    ):
        for count in range(1, OOM_KILLS + 1):
            wait_for(lambda: squeezed(group), "a limit that is too low")
            wait_for_death(mount, count)
            limit_file(group).write_text(str(1024 * MIB))
            wait_for_takeover(mount, count)
            if load.failures:
                raise Broken("; ".join(load.failures))
        assert len(servers(mount.pid)) == 1


def limit_file(group: Path) -> Path:
    v2 = group / "memory.max"
    return v2 if v2.exists() else group / "memory.limit_in_bytes"


def squeezed(group: Path) -> bool:
    """Lowers the limit to what the group has now, without its page cache. Returns whether that was possible."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    try:
        limit_file(group).write_text(str(int(stat.get("anon") or stat["total_rss"]) + MIB))
    except OSError:  # the first kind of control groups refuses what is used already
        return False
    return True


def wait_for_death(mount: Mount, count: int) -> None:
    """Waits until so many servers have died."""
    wait_for(lambda: mount.output().count("another one takes over") >= count, "the end of the server")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_guest_does_not_notice(tmp_path: Path, cache: str) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(4):
        random_image(files / f"data{number}", 3 * MIB + number, seed=number)
    www = tmp_path / "www"
    www.mkdir()
    guest.guest_disk(www / "disk", 48 * MIB, files)
    with nginx(www) as server:
        create(tmp_path / "disk.qed", f"{server.url}/disk")
        with (
            mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--restart", "--most-deaths", "1000") as mount,
            concurrent.futures.ThreadPoolExecutor() as pool,
        ):
            drive = f"file={mount.path('disk.raw')},format=raw,cache={cache}"
            console = pool.submit(guest.boot, drive)
            wait_until_serving(mount)
            kills = 0
            while not console.done():
                # The guest gets on a little with each server.
                wait_for(lambda: console.done() or mount.image()["counters"]["read"] > 3 * MIB, "reads of the guest")
                kill_server(mount)
                kills += 1
                wait_for_takeover(mount, kills)
            text = console.result()
            assert kills > 1
            assert guest.VERIFIED in text
            assert guest.DONE in text
            assert not [line for line in text.splitlines() if "I/O error" in line or "remount" in line.lower()]
            assert guest.read_back(mount.path("disk.raw")) == guest.WRITTEN
            assert mount.unmount() == 0


def test_a_server_that_hangs_is_replaced_before_the_service_manager_acts(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, origin(tmp_path, MIB) as source:
        manager.bind(str(tmp_path / "notify"))
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "4000000"}
        create(tmp_path / "disk.qed", source.url)
        with (
            mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--restart", env=env) as mount,
            opened(mount.path("disk.raw")) as fd,
        ):
            wait_for(lambda: said(manager, b"READY=1"), "READY=1")
            os.kill(servers(mount.pid)[0], signal.SIGSTOP)
            assert os.pread(fd, 4096, 0) == source.data()[:4096]
            wait_for(lambda: said(manager, b"WATCHDOG=1"), "a sign of life")
            assert "has been silent for" in mount.output()
            assert len(paused_seconds(mount)) == 1


def said(manager: socket.socket, message: bytes) -> bool:
    try:
        return manager.recv(4096, socket.MSG_DONTWAIT).startswith(message)
    except BlockingIOError:
        return False


@pytest.mark.parametrize("moment", range(4))
def test_a_server_that_is_killed_while_it_hands_over(tmp_path: Path, moment: int) -> None:
    with origin(tmp_path, MIB) as source, mounted_over(tmp_path, source.url, "--restart") as mount:
        image = mount.path("disk.raw")
        wait_until_serving(mount)
        with opened(image) as fd:
            os.pwrite(fd, b"written", 0)
            os.kill(mount.pid, signal.SIGUSR2)
            # The old one, before and after the new one is there, and the new one.
            if moment:
                wait_for(lambda: len(servers(mount.pid)) > 1, "the new server")
            kill = servers(mount.pid)
            os.kill(kill[-1 if moment == 3 else 0], signal.SIGKILL)
            if moment < 3:
                wait_for_takeover(mount, 1)
            os.pwrite(fd, b"again", 4096)
            assert os.pread(fd, 7, 0) == b"written"
            assert os.pread(fd, 5, 4096) == b"again"
        assert mount.unmount() == 0
