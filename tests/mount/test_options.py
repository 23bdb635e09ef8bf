"""What the options of `mount` do to a real mount."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.alone import alone_with
from tests.harness.hang import HANG_OPTION, HANG_SECONDS
from tests.harness.images import qemu_check
from tests.harness.mounts import is_mounted, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require, require_fuse, require_root, unavailable
from tests.harness.starter import popen

from .support import CLUSTER_SIZE, MIB, assert_same, assert_whole, create, mounted_over, opened, origin, read_direct
from .test_release import is_watched

SIZE = 16 * MIB
NOBODY = 65534
OTHER = 65533  # a uid without a name
FUSE = Path("/dev/fuse")


def test_no_stream_fetches_only_what_is_read(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        with opened(mount.path("disk.raw"), os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(fd, 4096, 8 * MIB) == source.data()[8 * MIB : 8 * MIB + 4096]
        # A reader has its bytes before they are in the overlay. What is not asked for does not come later, either.
        wait_for(lambda: mount.image()["populated"] >= CLUSTER_SIZE, "what was read")
        time.sleep(0.3)
        image = mount.image()
        assert image["state"] == "off"
        assert image["populated"] <= 4 * MIB
        assert mount.unmount() == 0
        assert qemu_check(tmp_path / "disk.qed") == (0, 0)


def test_no_copy_on_read_keeps_nothing(tmp_path: Path) -> None:
    with (
        origin(tmp_path, SIZE) as source,
        mounted_over(tmp_path, source.url, "--no-stream", "--no-copy-on-read") as mount,
    ):
        assert_same(mount.path("disk.raw"), source.raw)
        with mount.path("disk.raw").open("r+b") as image:
            image.write(b"kept")
        status = mount.image()
        assert (status["populated"], status["copy_on_read"]) == (CLUSTER_SIZE, False)
        assert mount.unmount() == 0
    assert (tmp_path / "disk.qed").stat().st_blocks * 512 < MIB


def test_the_overlay_may_say_no_copy_on_read_and_the_option_wins(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        create(tmp_path / "disk.qed", source.url, "--no-copy-on-read")
        with mounted_over(tmp_path, source.url, "--no-stream") as mount:
            assert_same(mount.path("disk.raw"), source.raw)
            assert mount.image()["populated"] == 0
            assert mount.unmount() == 0
        with mounted_over(tmp_path, source.url, "--no-stream", "--copy-on-read") as mount:
            assert_same(mount.path("disk.raw"), source.raw)
            # A reader has its bytes before they are in the overlay.
            wait_for(lambda: mount.image()["populated"] == SIZE, "the last clusters")
            assert mount.unmount() == 0


def test_a_stream_without_copy_on_read_still_streams(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--no-copy-on-read") as mount:
        mount.wait()
        assert mount.unmount() == 0
    assert_whole(tmp_path / "disk.qed", source.raw)


def test_the_limit_holds_the_stream_back_and_no_reader(tmp_path: Path) -> None:
    # At this rate, half of the image takes longer than a test may.
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--limit", "16K") as mount:
        wait_for(lambda: mount.image()["populated"] > 0, "the stream")
        assert read_direct(mount.path("disk.raw"), SIZE // 2, SIZE // 2) == source.data()[SIZE // 2 :]
        wait_for(lambda: mount.image()["populated"] > SIZE // 2, "what was read")
        image = mount.image()
        assert image["limit"] == 16 << 10
        assert image["populated"] < SIZE * 3 // 4


def test_until_streamed_ends_by_itself(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        create(tmp_path / "disk.qed", source.url)
        done = qedfs("mount", tmp_path / "disk.qed", _made(tmp_path / "mnt"), "--until-streamed")
        assert done.returncode == 0
        assert not is_mounted(tmp_path / "mnt")
    assert_whole(tmp_path / "disk.qed", source.raw)


def test_until_streamed_waits_for_the_last_close(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--until-streamed") as mount:
        with mount.path("disk.raw").open("r+b") as image:
            mount.wait()
            time.sleep(0.5)
            assert mount.returncode is None
            image.write(b"last word")
        assert mount.wait_exit() == 0
        assert not is_mounted(tmp_path / "mnt")
    expected = b"last word" + source.data()[9:]
    source.raw.write_bytes(expected)
    assert_whole(tmp_path / "disk.qed", source.raw)


def test_wait_returns_when_until_streamed_has_ended_the_mount(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        create(tmp_path / "disk.qed", source.url)
        with mounted(tmp_path / "disk.qed", tmp_path / "mnt", "--until-streamed", "--limit", "16K") as mount:
            with popen(["wait", mount.mountpoint, "--timeout", HANG_OPTION]) as waiting:
                wait_for(lambda: is_watched(mount), "somebody who waits")
                qedfs("stream", "limit", mount.mountpoint, "0")
                assert waiting.wait(HANG_SECONDS) == 0
            assert mount.wait_exit() == 0


def test_daemon_returns_when_it_serves(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        create(tmp_path / "disk.qed", source.url)
        qedfs("mount", tmp_path / "disk.qed", _made(tmp_path / "mnt"), "--daemon")
        try:
            assert_same(tmp_path / "mnt" / "disk.raw", source.raw)
            qedfs("wait", tmp_path / "mnt", "--timeout", HANG_OPTION)
        finally:
            qedfs("umount", tmp_path / "mnt")
    assert_whole(tmp_path / "disk.qed", source.raw)


def test_a_read_only_overlay_is_served_and_nothing_is_kept(tmp_path: Path) -> None:
    """The file system that holds it is mounted read-only: for root a mode alone is no obstacle."""
    require_root()
    holder = _made(tmp_path / "holder")
    with origin(tmp_path, SIZE) as source:
        overlay = create(holder / "disk.qed", source.url)
        before = overlay.read_bytes()
        _run(require("mount"), "--bind", holder, holder)
        try:
            _run(require("mount"), "-o", "remount,bind,ro", holder)
            with mounted(overlay, tmp_path / "mnt") as mount:
                image = mount.path("disk.raw")
                assert_same(image, source.raw)
                assert image.stat().st_mode & 0o222 == 0
                with pytest.raises(OSError, match="Read-only"):
                    os.open(image, os.O_RDWR)
                assert mount.image()["read_only"] is True
                assert "read-only" in mount.output()
                assert mount.unmount() == 0
        finally:
            _run(require("umount"), holder)
    assert overlay.read_bytes() == before


class User:
    """Another user, who has a folder, and runs qedfs from this checkout as the tests do."""

    def __init__(self, folder: Path, uid: int) -> None:
        self.folder = folder
        self.through: tuple[str, ...] = ()  # a command that runs another one, and its options
        self.inside: tuple[str, ...] = ()  # likewise, but run by this user
        self._uid = uid
        self.python = _reachable_python(uid)

    def run(self, *argv: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a program as this user, without a runtime folder."""
        return _run_as(self._uid, *self.inside, *argv, through=self.through, check=check)

    def qedfs(self, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `qedfs`."""
        return self.run(self.python, "-m", "qedfs", *args, check=check)


def _run_as(
    uid: int, *argv: str | Path, through: tuple[str, ...] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("XDG_RUNTIME_DIR", "HOME")}
    if sys.pycache_prefix:
        # Ours has nothing of another interpreter, and this user may not write there: each start would compile all.
        own = Path(f"{sys.pycache_prefix}-{uid}")
        own.mkdir(exist_ok=True)
        os.chown(own, uid, uid)
        environment["PYTHONPYCACHEPREFIX"] = str(own)
    become = (require("setpriv"), "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--")
    return subprocess.run(
        [*through, *become, *argv],
        check=check,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=HANG_SECONDS,
        env={**environment, "HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@functools.cache
def _reachable_python(uid: int) -> str:
    """An interpreter that this user can run with what we import; ours may lie in root's home."""
    version = "python{}.{}".format(*sys.version_info)
    for python in (f"/usr/bin/{version}", f"/usr/local/bin/{version}", os.path.realpath(sys.executable)):
        imports = (python, "-c", "import qedfs, click, pycurl, pyfuse3")
        if os.path.exists(python) and _run_as(uid, *imports, check=False).returncode == 0:
            return python
    return unavailable("needs an interpreter and a checkout that other users can reach")


@contextlib.contextmanager
def fuse_for_all() -> Iterator[None]:
    """/dev/fuse as udev makes it (systemd's 50-udev-default.rules): a machine without udev has it for root alone."""
    with alone_with("dev-fuse"):
        mode = FUSE.stat().st_mode
        FUSE.chmod(0o666)
        try:
            yield
        finally:
            FUSE.chmod(stat.S_IMODE(mode))


@contextlib.contextmanager
def user(uid: int) -> Iterator[User]:
    """A user with a folder that others may look into, or the end of the test."""
    require_root()
    require_fuse()
    folder = Path(tempfile.mkdtemp(prefix="qedfs-user-"))
    try:
        os.chown(folder, uid, uid)
        folder.chmod(0o755)
        with fuse_for_all():
            yield User(folder, uid)
    finally:
        subprocess.run([require("umount"), "--lazy", folder / "mnt"], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_any_user_mounts_through_fusermount(tmp_path: Path) -> None:
    with user(NOBODY) as nobody, origin(tmp_path, SIZE) as source:
        overlay, mountpoint = nobody.folder / "disk.qed", nobody.folder / "mnt"
        nobody.run("mkdir", mountpoint)
        nobody.qedfs("create", overlay, "--backing", source.url)
        nobody.qedfs("mount", overlay, mountpoint, "--daemon")
        nobody.run("cmp", mountpoint / "disk.raw", _public(source.raw, nobody.folder))
        nobody.qedfs("wait", mountpoint, "--timeout", HANG_OPTION)
        # Not even root sees it, unless the user has said --allow-other.
        with pytest.raises(PermissionError):
            (mountpoint / "disk.raw").stat()
        nobody.qedfs("umount", mountpoint)
        assert overlay.stat().st_uid == NOBODY
        assert_whole(overlay, source.raw)


def test_an_overlay_without_the_right_to_write_is_served_read_only(tmp_path: Path) -> None:
    with user(NOBODY) as nobody, origin(tmp_path, SIZE) as source:
        overlay, mountpoint = nobody.folder / "disk.qed", nobody.folder / "mnt"
        create(overlay, source.url)
        overlay.chmod(0o444)
        nobody.run("mkdir", mountpoint)
        nobody.qedfs("mount", overlay, mountpoint, "--daemon")
        nobody.run("cmp", mountpoint / "disk.raw", _public(source.raw, nobody.folder))
        refused = nobody.run("dd", "if=/dev/zero", f"of={mountpoint}/disk.raw", "conv=notrunc", "count=1", check=False)
        assert refused.returncode != 0
        nobody.qedfs("umount", mountpoint)


def test_others_are_let_in_as_far_as_the_mode_says(tmp_path: Path) -> None:
    overlays = Path(tempfile.mkdtemp(prefix="qedfs-other-"))
    overlays.chmod(0o755)
    try:
        with user(OTHER) as other, origin(tmp_path, SIZE) as source:
            for name, mode in (("open", 0o644), ("closed", 0o600)):
                create(overlays / f"{name}.qed", source.url).chmod(mode)
            os.chown(other.folder, 0, 0)
            with mounted(overlays, other.folder / "mnt", "--allow-other") as mount:
                other.run("head", "-c", "100", mount.path("open.raw"))
                refused = other.run("head", "-c", "1", mount.path("closed.raw"), check=False)
                assert "Permission denied" in refused.stderr
                written = other.run("dd", "if=/dev/zero", f"of={mount.path('open.raw')}", "conv=notrunc", check=False)
                assert "Permission denied" in written.stderr
            with mounted(overlays, other.folder / "mnt") as mount:
                refused = other.run("head", "-c", "1", mount.path("open.raw"), check=False)
                assert "Permission denied" in refused.stderr
    finally:
        shutil.rmtree(overlays)


def test_a_signal_ends_the_mount_in_order(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--no-stream") as mount:
        with mount.path("disk.raw").open("r+b") as image:
            image.write(b"before the signal")
        os.kill(mount.pid, 15)
        assert mount.wait_exit() == 0
        wait_for(lambda: not is_mounted(mount.mountpoint), "end of the mount")
        assert qemu_check(tmp_path / "disk.qed") == (0, 0)
        with mounted_over(tmp_path, source.url) as again:
            assert again.path("disk.raw").read_bytes()[:17] == b"before the signal"


def _public(raw: Path, folder: Path) -> Path:
    """A copy of a file that any user may read."""
    copy = folder / "origin.raw"
    shutil.copy(raw, copy)
    copy.chmod(0o644)
    return copy


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=HANG_SECONDS)
