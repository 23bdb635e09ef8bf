"""What a user meets when something is wrong: one line that names the thing and the way out, and an exit code."""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.harness.images import qemu_create, random_image
from tests.harness.mounts import is_mounted, mounted, qedfs
from tests.harness.process import Child, free_port, wait_for
from tests.harness.require import require
from tests.harness.servers import nbdkit, nginx

from .support import CLUSTER_SIZE, MIB, assert_same, assert_whole, create, mounted_over, opened, origin

SIZE = 16 * MIB
USAGE, BAD_OVERLAY, UNREACHABLE, CHANGED, NO_SPACE, TIMED_OUT, IN_USE, REFUSED, NOT_MOUNTED = range(2, 11)


def failing(exit_code: int, *args: str | Path) -> str:
    """Runs a command that has to fail with this code and one line; returns the line."""
    done = qedfs(*args, check=False)
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("qedfs: ")
    return lines[0]


# Creating.


def test_create_over_a_url_that_is_not_there(tmp_path: Path) -> None:
    with nginx(tmp_path) as server:
        url = f"{server.url}/none"
        line = failing(UNREACHABLE, "create", tmp_path / "disk.qed", "--backing", url)
    assert url in line
    assert "404" in line
    assert not (tmp_path / "disk.qed").exists()


@pytest.mark.parametrize("scheme", ["http", "nbd"])
def test_create_over_a_port_where_nobody_listens(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{free_port()}/disk"
    line = failing(UNREACHABLE, "create", tmp_path / "disk.qed", "--backing", url, "--source-timeout", "1s")
    assert url in line
    assert not (tmp_path / "disk.qed").exists()


def test_create_over_a_server_without_ranges(tmp_path: Path) -> None:
    random_image(tmp_path / "disk", MIB)
    with nginx(tmp_path, location="max_ranges 0;") as server:
        line = failing(UNREACHABLE, "create", tmp_path / "disk.qed", "--backing", f"{server.url}/disk")
    assert "range" in line


class WithoutLength(http.server.BaseHTTPRequestHandler):
    """Answers every request with a part of something whose length it does not tell."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-1/*")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"xx")

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quietly."""


def test_create_over_a_server_that_tells_no_length(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), WithoutLength) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/disk"
            line = failing(UNREACHABLE, "create", tmp_path / "disk.qed", "--backing", url)
        finally:
            server.shutdown()
            thread.join()
    assert re.search("length|size", line)


def test_create_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    line = failing(USAGE, "create", tmp_path / "none" / "disk.qed", "--size", "1M")
    assert str(tmp_path / "none") in line


def test_create_does_not_overwrite(tmp_path: Path) -> None:
    qedfs("create", tmp_path / "disk.qed", "--size", "1M")
    before = (tmp_path / "disk.qed").read_bytes()
    assert "exists" in failing(USAGE, "create", tmp_path / "disk.qed", "--size", "2M")
    assert (tmp_path / "disk.qed").read_bytes() == before


# Mounting.


@pytest.mark.parametrize("daemon", [(), ("--daemon",)])
def test_mount_of_what_cannot_be_mounted(tmp_path: Path, daemon: tuple[str, ...]) -> None:
    mountpoint, overlay = tmp_path / "mnt", tmp_path / "disk.qed"
    mountpoint.mkdir()
    assert "none.qed" in failing(USAGE, "mount", tmp_path / "none.qed", mountpoint, *daemon)
    overlay.write_text("This is no image.\n" * 1000)
    assert "disk.qed" in failing(BAD_OVERLAY, "mount", overlay, mountpoint, *daemon)
    qemu_create(tmp_path / "good.qed", size=MIB)
    assert "mkdir" in failing(USAGE, "mount", tmp_path / "good.qed", tmp_path / "none", *daemon)
    assert str(overlay) in failing(USAGE, "mount", tmp_path / "good.qed", overlay, *daemon)
    assert not is_mounted(mountpoint)


def test_a_backing_that_is_not_allowed(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "raw", MIB)
    overlay = qemu_create(tmp_path / "disk.qed", raw)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    line = failing(REFUSED, "mount", overlay, mountpoint)
    assert f"--allow-backing {raw}" in line
    with mounted(overlay, mountpoint, "--allow-backing", raw) as mount:
        assert_same(mount.path("disk.raw"), raw)


def test_an_overlay_that_another_program_has_open(tmp_path: Path) -> None:
    overlay = qemu_create(tmp_path / "disk.qed", size=MIB)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    address = tmp_path / "s"
    argv = [require("qemu-nbd"), "--persistent", "-f", "qed", "-k", str(address), str(overlay)]
    server = Child(argv, tmp_path / "log")
    try:
        server.wait_until(address.exists, "a socket")
        assert str(overlay) in failing(IN_USE, "mount", overlay, mountpoint)
    finally:
        server.stop()
    with mounted(overlay, mountpoint):
        other = tmp_path / "other"
        other.mkdir()
        assert str(overlay) in failing(IN_USE, "mount", overlay, other)
        refused = subprocess.run(
            [require("qemu-io"), "-f", "qed", "-c", "write 0 4k", overlay], capture_output=True, text=True, check=False
        )
        assert refused.returncode != 0
        assert "lock" in refused.stderr


def test_a_mountpoint_that_is_taken(tmp_path: Path) -> None:
    overlay = qemu_create(tmp_path / "disk.qed", size=MIB)
    other = qemu_create(tmp_path / "other.qed", size=MIB)
    with mounted(overlay, tmp_path / "mnt") as mount:
        assert str(tmp_path / "mnt") in failing(IN_USE, "mount", other, tmp_path / "mnt")
        os.kill(mount.pid, 9)
        mount.wait_exit()
        line = failing(IN_USE, "mount", overlay, tmp_path / "mnt")
        assert f"qedfs umount {tmp_path / 'mnt'}" in line
        qedfs("umount", tmp_path / "mnt")
    with mounted(overlay, tmp_path / "mnt") as mount:
        assert mount.path("disk.raw").read_bytes() == bytes(MIB)


def test_umount_of_what_is_not_mounted_or_busy(tmp_path: Path) -> None:
    overlay = qemu_create(tmp_path / "disk.qed", size=MIB)
    (tmp_path / "mnt").mkdir()
    assert "mounted" in failing(NOT_MOUNTED, "umount", tmp_path / "mnt")
    with mounted(overlay, tmp_path / "mnt") as mount:
        with mount.path("disk.raw").open("rb"):
            assert str(os.getpid()) in failing(IN_USE, "umount", tmp_path / "mnt")
        assert mount.unmount() == 0


# A source that is away, or is another one.


def test_a_source_that_is_away_when_we_mount(tmp_path: Path) -> None:
    """What is local is served at once, the rest fails in time, and all is well when the server comes."""
    with origin(tmp_path, SIZE) as source:
        data = source.data()
        with mounted_over(tmp_path, source.url, "--no-stream") as mount, opened(mount.path("disk.raw")) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(fd, MIB, 4 * MIB) == data[4 * MIB : 5 * MIB]
        source.server.stop()
        # What is local waits for nobody: this test would not live to see the end of that deadline.
        with (
            mounted_over(tmp_path, source.url, "--source-timeout", "1h") as mount,
            opened(mount.path("disk.raw")) as fd,
        ):
            assert os.pread(fd, MIB, 4 * MIB) == data[4 * MIB : 5 * MIB]
            assert os.pwrite(fd, bytes(CLUSTER_SIZE), 8 * MIB) == CLUSTER_SIZE
        with (
            mounted_over(tmp_path, source.url, "--source-timeout", "1s") as mount,
            opened(mount.path("disk.raw")) as fd,
        ):
            with pytest.raises(OSError, match="Input/output") as caught:
                os.pread(fd, 4096, 12 * MIB)
            assert caught.value.errno == errno.EIO
            # A write of a part of a cluster needs the rest of it.
            with pytest.raises(OSError, match="Input/output"):
                os.pwrite(fd, b"x", 12 * MIB)
            wait_for(lambda: source.url in (mount.image()["error"] or ""), "the error in the status")
            assert mount.image()["state"] in ("running", "waiting")
            source.server.restart()
            mount.wait()
            expected = data[: 8 * MIB] + bytes(CLUSTER_SIZE) + data[8 * MIB + CLUSTER_SIZE :]
            assert mount.path("disk.raw").read_bytes() == expected
            assert mount.image()["error"] is None


@pytest.mark.parametrize("change", ["smaller", "larger", "other"])
def test_a_source_that_is_another_version(tmp_path: Path, change: str) -> None:
    with origin(tmp_path, SIZE) as source:
        data = source.data()
        with mounted_over(tmp_path, source.url, "--no-stream") as mount, opened(mount.path("disk.raw")) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(fd, CLUSTER_SIZE, 0) == data[:CLUSTER_SIZE]
        size = {"smaller": SIZE - MIB, "larger": SIZE + MIB, "other": SIZE}[change]
        random_image(source.raw, size, seed=1)
        os.utime(source.raw, (1, 1))
        with (
            mounted_over(tmp_path, source.url, "--source-timeout", "1h") as mount,
            opened(mount.path("disk.raw")) as fd,
        ):
            wait_for(lambda: mount.image()["state"] == "source-changed", "the state")
            assert source.url in mount.image()["error"]
            line = failing(CHANGED, "wait", mount.mountpoint)
            assert source.url in line
            assert os.pread(fd, CLUSTER_SIZE, 0) == data[:CLUSTER_SIZE]
            # At once: this test would not live to see the end of the deadline.
            with pytest.raises(OSError, match="Input/output"):
                os.pread(fd, 4096, 8 * MIB)
            assert os.pwrite(fd, b"w" * CLUSTER_SIZE, MIB) == CLUSTER_SIZE
            assert source.url in mount.output()


def test_a_source_that_changes_while_it_streams(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--limit", "4M") as mount:
        data = source.data()
        wait_for(lambda: mount.image()["populated"] > MIB, "the stream")
        other = random_image(tmp_path / "other", SIZE, seed=1)
        os.utime(other, (1, 1))
        other.replace(source.raw)
        wait_for(lambda: mount.image()["state"] == "source-changed", "the state")
        with opened(mount.path("disk.raw"), os.O_RDONLY) as fd:
            for pos in range(0, SIZE, CLUSTER_SIZE):
                with contextlib.suppress(OSError):
                    assert os.pread(fd, CLUSTER_SIZE, pos) == data[pos : pos + CLUSTER_SIZE]


def test_a_server_that_dies_and_comes_back_while_it_streams(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--limit", "16M") as mount:
        for _ in range(3):
            source.server.kill()
            time.sleep(0.2)
            source.server.restart()
            time.sleep(0.2)
        mount.wait()
        assert mount.unmount() == 0
    assert_whole(tmp_path / "disk.qed", source.raw)


def test_an_nbd_server_that_dies_and_comes_back(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "disk", SIZE)
    with nbdkit("file", raw, tcp=True) as server, mounted_over(tmp_path, server.url, "--limit", "16M") as mount:
        for _ in range(3):
            server.kill()
            time.sleep(0.2)
            server.restart()
            time.sleep(0.2)
        mount.wait()
        assert mount.unmount() == 0
    assert_whole(tmp_path / "disk.qed", raw)


def test_wait_gives_up_in_time(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--limit", "1M") as mount:
        line = failing(TIMED_OUT, "wait", mount.mountpoint, "--timeout", "500ms")
        assert "disk.raw" in line


def test_secrets_of_a_url_are_nowhere(tmp_path: Path) -> None:
    random_image(tmp_path / "disk", MIB)
    password = "kUrZwEiL"
    with nginx(tmp_path) as server:
        host = server.url.removeprefix("http://")
        url = f"http://user:{password}@{host}/disk?token={password}"
        create(tmp_path / "disk.qed", url)
        shutil.copy(tmp_path / "disk.qed", tmp_path / "copy.qed")
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--verbose", own_interpreter=True) as mount:
            mount.wait()
            seen = mount.output() + Path("/proc/mounts").read_text(errors="replace") + str(mount.status())
            seen += Path(f"/proc/{mount.pid}/cmdline").read_text()
            assert password not in seen
        with mounted(
            tmp_path / "copy.qed", tmp_path / "mnt", "--verbose", "--source-timeout", "1s", "--no-stream"
        ) as mount:
            server.stop()
            with opened(mount.path("copy.raw")) as fd, pytest.raises(OSError, match="Input/output"):
                os.pread(fd, 1, 0)
            assert password not in mount.output() + str(mount.status())
