"""What `qedfs mount` says of its arguments before it mounts: one line with the way out."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from qedfs.cli import mount_checks
from qedfs.format.header import MAGIC
from qedfs.overlay.create import create_overlay
from tests.harness.hang import HANG_SECONDS
from tests.harness.images import qemu_create, random_image
from tests.harness.mounts import mounted, qedfs
from tests.harness.process import QEDFS, free_port
from tests.harness.require import require, require_root, unavailable
from tests.mount.support import MIB
from tests.mount.test_options import NOBODY, user
from tests.mount.test_user_errors import BAD_OVERLAY, IN_USE, NOT_MOUNTED, UNREACHABLE, USAGE, failing


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path


@pytest.mark.parametrize("daemon", [(), ("--daemon",)])
def test_a_url_is_not_mounted_but_an_overlay_over_it(place: Path, daemon: tuple[str, ...]) -> None:
    url = "https://me:secret@host.example/images/debian-12.raw?token=secret"
    line = failing(USAGE, "mount", url, place / "mnt", *daemon)
    assert "is a URL; first create an overlay over it: qedfs create debian-12.qed --backing " in line
    assert line.endswith(f"; then: qedfs mount debian-12.qed {place / 'mnt'}")
    assert "secret" not in line
    line = failing(USAGE, "mount", "ftp://me:secret@host.example/debian.raw", place / "mnt", *daemon)
    assert line.startswith("qedfs: ftp://host.example/debian.raw: is a URL; ")


def test_an_image_is_not_mounted_but_an_overlay_over_it(place: Path) -> None:
    raw = random_image(place / "disk.raw", MIB)
    qcow2 = place / "disk.qcow2"
    qcow2.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(MIB))
    line = failing(BAD_OVERLAY, "mount", raw, place / "mnt")
    assert (
        f"is not an overlay; to mount a disk image, create an overlay over it: qedfs create disk.qed --backing {raw};"
        in line
    )
    line = failing(BAD_OVERLAY, "mount", qcow2, place / "mnt")
    assert "is not an overlay but looks like qcow2; " in line
    assert line.endswith(f"qedfs mount disk.qed {place / 'mnt'} --allow-backing {qcow2}")


def test_swapped_arguments_are_shown_in_order(place: Path) -> None:
    overlay = qemu_create(place / "disk.qed", size=MIB)
    line = failing(USAGE, "mount", place / "mnt", overlay)
    assert line.endswith(f"name the overlay first, then the folder to mount on: qedfs mount {overlay} {place / 'mnt'}")


def test_a_folder_with_files_is_mounted_on_and_that_is_said(place: Path) -> None:
    overlay = qemu_create(place / "disk.qed", size=MIB)
    (place / "mnt" / "letter").touch()
    said = f"qedfs: {place / 'mnt'}: is not empty; what is in it is hidden until the mount ends\n"
    with mounted(overlay, place / "mnt") as mount:
        assert mount.output().startswith(said)
    try:
        assert qedfs("mount", overlay, place / "mnt", "--daemon").stderr == said
    finally:
        qedfs("umount", place / "mnt")
    (place / "mnt" / "letter").unlink()
    with mounted(overlay, place / "mnt") as mount:
        assert "not empty" not in mount.output()


def test_a_rule_for_a_stream_that_is_off(place: Path) -> None:
    overlay = qemu_create(place / "disk.qed", size=MIB)
    done = qedfs("mount", overlay, place / "mnt", "--daemon", "--stream", "off", "--stream-between", "22:00-06:00")
    qedfs("umount", place / "mnt")
    assert done.stderr == (
        "qedfs: --stream off: nothing streams until qedfs stream start; --stream-between counts from then on\n"
    )


def test_the_second_mount_of_an_overlay_says_where_the_first_is(place: Path) -> None:
    (place / "vms").mkdir()
    overlay = qemu_create(place / "vms" / "disk.qed", size=MIB)
    for source in (overlay, overlay.parent):
        with mounted(source, place / "first") as mount:
            line = failing(IN_USE, "mount", overlay, place / "mnt")
            assert f"{overlay}: is mounted at {place / 'first'} already by pid {mount.pid}; " in line
            assert line.endswith(f"qedfs umount {place / 'first'}")
            line = failing(IN_USE, "mount", overlay, place / "first")
            assert f"{source} is mounted there already" in line


@pytest.mark.parametrize(("daemon", "name"), [((), "second.qed"), (("--daemon",), "")])
def test_a_mountpoint_whose_server_is_stopped_is_refused_without_waiting_for_it(
    place: Path, daemon: tuple[str, ...], name: str
) -> None:
    """Whether an overlay or a folder of them is to be mounted."""
    first, _ = (qemu_create(place / f"{name}.qed", size=MIB) for name in ("first", "second"))
    with mounted(first, place / "mnt") as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            line = failing(IN_USE, "mount", place / name, place / "mnt", *daemon)
            assert f"{first} is mounted there already" in line
        finally:
            os.kill(mount.pid, signal.SIGCONT)


def test_a_backing_on_a_mount_whose_server_is_stopped_costs_the_time_that_is_given(place: Path) -> None:
    overlay = qemu_create(place / "first.qed", size=MIB)
    with mounted(overlay, place / "mnt") as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            backing = place / "mnt" / "first.raw"
            line = failing(UNREACHABLE, "create", place / "new.qed", "--backing", backing, "--source-timeout", "1s")
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        assert line.endswith(f"backing {backing} gave no answer within 1 s")
    assert not (place / "new.qed").exists()


def test_another_users_mount_is_said_to_be_his(place: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/disk"
    with user(NOBODY) as nobody:
        overlay, mountpoint = nobody.folder / "disk.qed", nobody.folder / "mnt"
        create_overlay(str(overlay), image_size=16 * MIB, backing=url)
        with mounted(overlay, mountpoint):
            for command, whose in (("status", "talk to its server"), ("wait", "talk to its server")):
                done = nobody.qedfs(command, mountpoint, check=False)
                assert done.returncode == NOT_MOUNTED
                assert (
                    done.stderr
                    == f"qedfs: {mountpoint}: is a mount of user root; only that user and root can {whose}\n"
                )
            done = nobody.qedfs("umount", mountpoint, check=False)
            assert done.returncode == 1
            assert (
                done.stderr == f"qedfs: {mountpoint}: is a mount of user root; only that user and root can unmount it\n"
            )
            overlay.chmod(0o600)
            done = nobody.qedfs("mount", overlay, mountpoint, check=False)
            assert done.returncode == IN_USE
            assert f"{overlay} is mounted there already" in done.stderr
        (mountpoint.parent / "own").mkdir()
        os.chown(mountpoint.parent / "own", NOBODY, NOBODY)
        done = nobody.qedfs("mount", overlay, mountpoint.parent / "own", check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "Permission denied; it belongs to root and has the mode 0600" in done.stderr


def test_a_mountpoint_that_a_user_may_not_see_is_not_said_to_be_missing(place: Path) -> None:
    closed = place / "closed"
    (closed / "mnt").mkdir(parents=True)
    closed.chmod(0o700)
    with user(NOBODY) as nobody:
        nobody.run("mkdir", nobody.folder / "mnt")
        nobody.qedfs("create", nobody.folder / "disk.qed", "--size", "1M")
        mount = ("mount", nobody.folder / "disk.qed", closed / "mnt")
        for words in (mount, (*mount, "--daemon"), ("status", closed / "mnt"), ("umount", closed / "mnt")):
            done = nobody.qedfs(*words, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "Permission denied" in done.stderr


def test_a_mount_on_the_overlays_is_refused_in_one_line(place: Path) -> None:
    qemu_create(place / "disk.qed", size=MIB)
    assert "holds the overlays; mount on another folder" in failing(USAGE, "mount", place, place)


def test_a_damaged_overlay_is_not_taken_for_a_disk(place: Path) -> None:
    overlay = qemu_create(place / "disk.qed", size=MIB)
    with overlay.open("r+b") as file:
        file.write(b"XXXX")
    assert failing(BAD_OVERLAY, "mount", overlay, place / "mnt") == f"qedfs: {overlay}: not a QED image"


@pytest.mark.parametrize(("microseconds", "said"), [("120000000", "90"), ("", ""), ("none", ""), ("-1", "")])
def test_the_watchdog_of_a_unit_is_compared_with_the_kernels_limit(
    monkeypatch: pytest.MonkeyPatch, microseconds: str, said: str
) -> None:
    """A server that hangs is replaced after three quarters of its time."""
    monkeypatch.setattr(mount_checks, "remark_on_watchdog", lambda silence: f"{silence:g}")
    assert mount_checks._remark_on_watchdog(microseconds) == said


def test_the_kernels_limit_on_requests_is_told_at_the_mount(place: Path) -> None:
    """The limit counts for the whole machine, so this command alone sees another one."""
    require_root()
    sysctl = Path("/proc/sys/fs/fuse/max_request_timeout")
    if not sysctl.exists():
        unavailable("needs Linux 6.15, whose FUSE has a limit on requests")
    (place / "limit").write_text("60\n")
    (place / "disk.qed").write_bytes(MAGIC + bytes(4092))
    hidden = ("unshare", "--mount", "sh", "-euc", 'mount --bind "$1" "$2"; shift 2; exec "$@"', "sh")
    words: list[str | Path] = [*QEDFS, "mount", place / "disk.qed", place / "mnt", "--on-source-error", "wait"]
    done = subprocess.run(
        [require(hidden[0]), *hidden[1:], place / "limit", sysctl, *words],
        env={**os.environ, "WATCHDOG_USEC": "120000000"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == BAD_OVERLAY
    waits, watchdog = done.stderr.splitlines()[:2]
    assert "does not answer a request within 60 s" in waits
    assert waits.endswith("for 55 s at most")
    assert "within 60 s" in watchdog
    assert "a server that hangs is replaced after 90 s" in watchdog
