"""When a real mount streams: the machine's load, hours of the day, a delay, and what `status` says meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import Child, wait_for
from tests.harness.require import require, require_fuse, unavailable
from tests.mount.support import MIB, assert_whole, create, mounted_over, origin

SIZE = 4 * MIB
# Read by every Python that starts with it in its PYTHONPATH: from the moment when {flag} is there, the kernel tells
# that nobody waits for this machine. Other tests may run beside, and it may be anything but quiet.
QUIET = """
import os, pathlib
read_text = pathlib.Path.read_text
def quiet(path, *args, **kwargs):
    if path.is_relative_to("/proc/pressure") and os.path.exists({flag!r}):
        return "some avg10=0.00 avg60=0.00 avg300=0.00 total=0"
    return read_text(path, *args, **kwargs)
pathlib.Path.read_text = quiet
"""


@contextlib.contextmanager
def disk_load() -> Iterator[Child]:
    """Four processes read and write at random on this machine's disk, past the page cache."""
    if not Path("/proc/pressure/io").exists():
        unavailable("needs a kernel that tells its pressure (PSI)")
    # Not on a tmpfs, as /tmp often is: there is no disk below it.
    folder = Path(tempfile.mkdtemp(prefix="qedfs-load-", dir="/var/tmp"))
    words = ["--name=load", "--rw=randrw", "--direct=1", "--bs=4k", "--size=16M", "--time_based", "--runtime=60"]
    try:
        child = Child([require("fio"), *words, "--numjobs=4", f"--directory={folder}"], folder / "output")
        try:
            child.wait_until(lambda: (folder / "load.3.0").exists(), "files to work on")
            yield child
        finally:
            child.stop()
    finally:
        shutil.rmtree(folder)


def test_an_idle_stream_holds_off_while_the_disk_is_busy_and_goes_on_after(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        (tmp_path / "sitecustomize.py").write_text(QUIET.format(flag=str(tmp_path / "quiet")))
        environment = {"PYTHONPATH": str(tmp_path)}
        with disk_load() as load, mounted(overlay, tmp_path / "mnt", "--stream", "idle", env=environment) as mount:
            wait_for(lambda: "disk is busy" in _reason(mount), "the disk's load as a reason")
            assert mount.image()["state"] == "waiting"
            assert mount.image()["populated"] == 0
            words = "the machine's disk is busy: tasks waited"
            wait_for(lambda: words in qedfs("status", mount.mountpoint).stdout, "the reason in the status")
            load.stop()
            (tmp_path / "quiet").touch()
            mount.wait()
            assert mount.unmount() == 0
        assert_whole(tmp_path / "disk.qed", source.raw)


def test_outside_its_hours_a_stream_waits_and_a_reader_does_not(tmp_path: Path) -> None:
    hours = _hours(120, 180)
    with origin(tmp_path, SIZE) as source, mounted_over(tmp_path, source.url, "--stream-between", hours) as mount:
        wait_for(lambda: mount.image()["state"] == "waiting", "a stream that waits")
        assert _reason(mount) == f"outside its hours, until {hours[:5]}"
        assert mount.path("disk.raw").read_bytes()[-4096:] == source.data()[-4096:]
        assert mount.unmount() == 0


def test_hours_come_and_go(tmp_path: Path) -> None:
    """Like a timer that mounts at any time: outside of the hours nothing, inside them all of it."""
    with origin(tmp_path, SIZE) as source:
        with mounted_over(tmp_path, source.url, "--stream-between", _hours(60, 120)) as mount:
            wait_for(lambda: mount.image()["state"] == "waiting", "a stream that waits")
            assert mount.image()["populated"] == 0
            assert mount.unmount() == 0
        with mounted_over(tmp_path, source.url, "--stream-between", _hours(-60, 60)) as mount:
            mount.wait()
            assert mount.unmount() == 0
        assert_whole(tmp_path / "disk.qed", source.raw)


def test_the_hours_are_those_of_the_time_zone(tmp_path: Path) -> None:
    """Six hours to the east, a window around our noon is over."""
    hours = _hours(-30, 30)
    with origin(tmp_path, SIZE) as source:
        overlay, mountpoint = create(tmp_path / "disk.qed", source.url), tmp_path / "mnt"
        mountpoint.mkdir()
        with _daemon(overlay, mountpoint, "-o", f"stream_between={hours}", env={"TZ": _east(6)}) as mount:
            wait_for(lambda: mount.image()["state"] == "waiting", "a stream that waits")
            assert _reason(mount).startswith("outside its hours")
        with _daemon(overlay, mountpoint, "-o", f"stream-between={hours}") as mount:
            mount.wait()
        assert_whole(overlay, source.raw)


def test_a_delay(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source:
        overlay, mountpoint = create(tmp_path / "disk.qed", source.url), tmp_path / "mnt"
        mountpoint.mkdir()
        with _daemon(overlay, mountpoint, "--stream-delay", "1h-2h") as mount:
            assert mount.image()["state"] == "waiting"
            assert _reason(mount).startswith("starts in ")
            assert mount.image()["populated"] == 0
        with _daemon(overlay, mountpoint, "--stream-delay", "1s-2s") as mount:
            mount.wait()
        assert_whole(overlay, source.raw)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--stream", "sometimes"], "'sometimes' is not one of 'eager', 'idle', 'off'"),
        (["--stream-between", "22-6"], "'22-6' is not a time window; write it like 22:00-06:00"),
        (["--stream-delay", "2m-30s"], "'2m-30s': the range ends before it starts"),
        (["-o", "stream_delay=soon"], "'soon' is not a duration"),
    ],
)
def test_what_is_no_rule(tmp_path: Path, words: list[str], complaint: str) -> None:
    done = qedfs("mount", tmp_path / "disk.qed", tmp_path, *words, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr


def _reason(mount: Mount) -> str:
    return mount.image()["reason"] or ""


@contextlib.contextmanager
def _daemon(overlay: Path, mountpoint: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[_Daemon]:
    require_fuse()
    qedfs("mount", overlay, mountpoint, "--daemon", *options, env=env)
    try:
        yield _Daemon(mountpoint)
    finally:
        qedfs("umount", mountpoint)


class _Daemon(Mount):
    """A mount whose process is not ours: what can be asked over its control socket."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint


def _hours(start_minutes: int, end_minutes: int) -> str:
    """A window from and until so many minutes from now."""
    now = datetime.datetime.now()
    ends = [now + datetime.timedelta(minutes=minutes) for minutes in (start_minutes, end_minutes)]
    return "-".join(f"{end:%H:%M}" for end in ends)


def _east(hours: int) -> str:
    """A time zone so far east of ours, as tzset(3) takes it: its sign is what has to be added to get UTC."""
    offset = datetime.datetime.now().astimezone().utcoffset()
    assert offset is not None
    minutes = -(round(offset.total_seconds() / 60) + 60 * hours)
    return f"EAST{'-' if minutes < 0 else ''}{abs(minutes) // 60}:{abs(minutes) % 60:02}"
