"""A mount with a holder: its servers are killed, replaced or told to end, and its users go on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.images import qemu_check, qemu_same
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import Command, wait_for

from .outlives import Broken, kill_server, loaded, servers, wait_for_takeover, wait_until_serving
from .support import MIB, Origin, assert_same, create, mounted_over, opened, origin

MNT_FORCE, MNT_DETACH = 1, 2


@contextlib.contextmanager
def held(folder: Path, *options: str | Path, location: str = "") -> Iterator[tuple[Mount, Origin]]:
    """A mount with a holder, and its source."""
    with (
        origin(folder, 4 * MIB, location=location) as source,
        mounted_over(folder, source.url, "--restart", *options) as mount,
    ):
        wait_until_serving(mount)
        yield mount, source


def test_a_killed_server_is_replaced_and_open_files_go_on(tmp_path: Path) -> None:
    with held(tmp_path, "--no-stream") as (mount, source):
        image = mount.path("disk.raw")
        expected = bytearray(source.data())
        with opened(image) as fd:
            inode = os.fstat(fd).st_ino
            for count in (1, 2):
                data = bytes([count]) * 5000
                os.pwrite(fd, data, 70_000 * count)
                expected[70_000 * count : 70_000 * count + 5000] = data
                kill_server(mount)
                os.pwrite(fd, b"later", 300_000 * count)
                expected[300_000 * count : 300_000 * count + 5] = b"later"
                wait_for_takeover(mount, count)
            assert os.pread(fd, 4 * MIB, 0) == expected
            assert image.stat().st_ino == inode
            assert mount.image()["opens"] == 1
        status = mount.status()
        assert status["restarts"] == 2
        assert status["last_restart"]["reason"] == "SIGKILL"
        wait_for(lambda: mount.image()["opens"] == 0, "release of the image")
        (tmp_path / "model").write_bytes(expected)
        qedfs("stream", "start", mount.mountpoint)
        mount.wait()
        assert_same(image, tmp_path / "model")
        assert mount.unmount() == 0
    # A kill may leave leaks, nothing else.
    assert qemu_check(tmp_path / "disk.qed").corruptions == 0
    assert qemu_same(tmp_path / "disk.qed", tmp_path / "model")


def test_a_read_in_flight_is_answered_by_the_next_server(tmp_path: Path) -> None:
    with held(tmp_path, "--no-stream") as (mount, source), opened(mount.path("disk.raw")) as fd:
        source.server.stop()
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(os.pread(fd, 8192, MIB)))
        reader.start()
        wait_for(lambda: mount.image()["condition"] != "ok", "a reader that waits for the source")
        kill_server(mount)
        source.server.restart()
        reader.join()
        wait_for_takeover(mount, 1)
        assert found == [source.data()[MIB : MIB + 8192]]
        assert mount.status()["restarts"] == 1


def test_limits_cancels_and_pauses_stay_as_they_were(tmp_path: Path) -> None:
    with held(tmp_path, "--limit", "64K") as (mount, _):
        qedfs("stream", "limit", mount.mountpoint, "disk.raw", "96K")
        qedfs("stream", "cancel", mount.mountpoint, "disk.raw")
        wait_for(lambda: mount.image()["state"] == "off", "the end of the stream")
        qedfs("upgrade", mount.mountpoint)
        assert (mount.image()["limit"], mount.image()["state"]) == (96 << 10, "off")
        qedfs("stream", "start", mount.mountpoint, "disk.raw")
        qedfs("stream", "pause", mount.mountpoint, "disk.raw")
        qedfs("upgrade", mount.mountpoint)
        wait_for(lambda: mount.image()["state"] == "paused", "the pause")
        assert mount.unmount() == 0


def test_an_upgrade_keeps_open_files(tmp_path: Path) -> None:
    with held(tmp_path, "--limit", "1M") as (mount, source), opened(mount.path("disk.raw")) as fd:
        os.pwrite(fd, b"before", 0)
        before = servers(mount.pid)
        done = qedfs("upgrade", mount.mountpoint)
        assert f"from {before[0]}; requests waited for" in done.stdout
        assert os.pread(fd, 8, 0) == b"before" + source.data()[6:8]
        os.pwrite(fd, b"after", 100)
        assert os.pread(fd, 5, 100) == b"after"
        assert servers(mount.pid) != before
        assert mount.status()["last_restart"]["reason"] == "an upgrade"


def test_a_new_server_that_cannot_start_leaves_the_old_one_serving(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("")
    keys.chmod(0o600)
    with held(tmp_path, "--no-stream", "--credentials", keys) as (mount, source):
        before = servers(mount.pid)
        keys.unlink()
        done = qedfs("upgrade", mount.mountpoint, check=False)
        assert done.returncode == 1
        assert f"the new server could not start, so the old one serves on: {keys}" in done.stderr
        assert servers(mount.pid) == before
        assert_same(mount.path("disk.raw"), source.raw)
        assert mount.unmount() == 0


def test_a_mount_without_a_holder_cannot_be_upgraded(tmp_path: Path) -> None:
    with origin(tmp_path, MIB) as source, mounted_over(tmp_path, source.url) as mount:
        done = qedfs("upgrade", mount.mountpoint, check=False)
        assert done.returncode == 1
        assert f"{mount.mountpoint}: cannot be upgraded: the mount has no holder" in done.stderr
        assert mount.status()["restarts"] == 0


def test_a_server_that_dies_again_and_again_ends_the_mount(tmp_path: Path) -> None:
    with held(tmp_path, "--no-stream", "--most-deaths", "2") as (mount, _):
        kill_server(mount)
        wait_for_takeover(mount, 1)
        kill_server(mount)
        assert mount.wait_exit() == 1
        assert "its server has died 2 times within a minute, the last time by SIGKILL" in mount.output()
        assert not os.path.ismount(mount.mountpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_holder_ends_the_mount_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with held(tmp_path, "--no-stream") as (mount, source):
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"written", 0)
        assert Path(f"/proc/{mount.pid}/comm").read_text() == "qedfs\n"  # which pidof(8) and killall(1) go by
        os.kill(mount.pid, number)
        assert mount.wait_exit() == 0
        model = tmp_path / "model"
        model.write_bytes(b"written" + source.data()[7:])
        with mounted_over(tmp_path, source.url) as again:
            assert_same(again.path("disk.raw"), model)


def test_if_the_holder_is_killed_the_mount_ends_with_a_report(tmp_path: Path) -> None:
    with held(tmp_path, "--no-stream") as (mount, _):
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"written", 0)
        server = os.pidfd_open(servers(mount.pid)[0])
        os.kill(mount.pid, signal.SIGKILL)
        wait_for(lambda: bool(_ended(server)), "the end of the server")
        os.close(server)
        assert not os.path.ismount(mount.mountpoint)
        assert "the holder of the mount was killed" in mount.output()


def test_a_stopped_server_notices_the_end_of_its_holder(tmp_path: Path) -> None:
    with held(tmp_path, "--no-stream") as (mount, _):
        server = servers(mount.pid)[0]
        process = os.pidfd_open(server)
        try:
            os.kill(server, signal.SIGSTOP)
            os.kill(mount.pid, signal.SIGKILL)
            wait_for(lambda: bool(_ended(process)), "the end of the server")
        finally:
            os.kill(server, signal.SIGKILL) if not _ended(process) else None
            os.close(process)
        assert not os.path.ismount(mount.mountpoint)


def test_a_mount_that_is_taken_away_before_it_answers_ends(tmp_path: Path) -> None:
    """A process that lists mounts all the time takes it away in the moment when it is there."""
    with origin(tmp_path, MIB) as source:
        overlay, mountpoint = create(tmp_path / "disk.qed", source.url), tmp_path / "mnt"
        mountpoint.mkdir()
        process = Command(["mount", overlay, mountpoint, "--restart", "--no-stream"], tmp_path / "log")
        try:
            path = os.fsencode(mountpoint)
            while path not in Path("/proc/self/mountinfo").read_bytes():
                assert process.returncode is None
            ctypes.CDLL(None).umount2(path, MNT_FORCE | MNT_DETACH)
            assert process.wait() == 0
        finally:
            for pid in servers(process.pid):
                if process.returncode is None:
                    os.kill(pid, signal.SIGKILL)
            process.kill()


def test_an_unmount_while_nobody_serves_waits_for_the_overlays(tmp_path: Path) -> None:
    with held(tmp_path, "--no-stream") as (mount, source):
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"written", MIB)
        kill_server(mount)
        qedfs("umount", mount.mountpoint)
        model = tmp_path / "model"
        model.write_bytes(source.data()[:MIB] + b"written" + source.data()[MIB + 7 :])
        with mounted(tmp_path / "disk.qed", tmp_path / "again") as again:
            assert_same(again.path("disk.raw"), model)
        assert mount.wait_exit() == 0


def test_an_overlay_that_was_replaced_meanwhile_is_another_image(tmp_path: Path) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    with origin(tmp_path, MIB) as source:
        create(folder / "disk.qed", source.url)
        with mounted(folder, tmp_path / "mnt", "--restart", "--no-stream") as mount:
            image = mount.path("disk.raw")
            wait_until_serving(mount)
            with opened(image) as fd:
                other = create(tmp_path / "other.qed", source.url)
                os.kill(mount.pid, signal.SIGSTOP)  # or the next server might be too quick
                kill_server(mount)
                other.rename(folder / "disk.qed")
                os.kill(mount.pid, signal.SIGCONT)
                wait_for_takeover(mount, 1)
                with pytest.raises(OSError, match=r"Stale file handle|Input/output error"):
                    os.pwrite(fd, b"not into the new one", 0)
            assert_same(image, source.raw)


def test_a_few_kills_under_load_are_noticed_by_nobody(tmp_path: Path) -> None:
    """contrib/outlive does the same for as long as you like."""
    with loaded(tmp_path, "--most-deaths", "100", size=8 * MIB) as (mount, load):
        for count in range(1, 4):
            kill_server(mount)
            wait_for_takeover(mount, count)
            if load.failures:
                raise Broken("; ".join(load.failures))
        qedfs("upgrade", mount.mountpoint)


def _ended(process: int) -> list[int]:
    return select.select([process], [], [], 0)[0]


def test_a_signal_while_a_server_takes_over_ends_the_mount_in_order(tmp_path: Path) -> None:
    with held(tmp_path, "--no-stream") as (mount, source):
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, b"written", 0)
        before = servers(mount.pid)
        kill_server(mount)
        wait_for(lambda: servers(mount.pid) not in ([], before), "the next server")
        os.kill(mount.pid, signal.SIGTERM)
        assert mount.wait_exit() == 0
        model = tmp_path / "model"
        model.write_bytes(b"written" + source.data()[7:])
        with mounted_over(tmp_path, source.url) as again:
            assert_same(again.path("disk.raw"), model)
