"""`mount --read-only`: images that nobody can write, over overlays that stay as they are."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.mounts import mounted, qedfs

from .support import CLUSTER_SIZE, MIB, Origin, assert_same, create, opened, origin

MINE = b"mine" * (CLUSTER_SIZE // 4)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Origin]:
    with origin(tmp_path, 4 * MIB) as found:
        yield found


@pytest.fixture
def overlay(tmp_path: Path, source: Origin) -> Path:
    return create(tmp_path / "disk.qed", source.url)


def write_mine(image: Path) -> None:
    with opened(image) as fd:
        os.pwrite(fd, MINE, 2 * CLUSTER_SIZE)


def expect_mine(source: Origin, path: Path) -> Path:
    """What the image has to read as after `write_mine`."""
    data = bytearray(source.data())
    data[2 * CLUSTER_SIZE : 3 * CLUSTER_SIZE] = MINE
    path.write_bytes(data)
    return path


def test_everything_is_read_and_nothing_is_changed(source: Origin, overlay: Path, tmp_path: Path) -> None:
    with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
        write_mine(mount.path("disk.raw"))
        assert mount.unmount() == 0
    before = (overlay.read_bytes(), overlay.stat().st_mtime_ns)
    with mounted(overlay, tmp_path / "mnt", "--read-only") as mount:
        image = mount.path("disk.raw")
        assert_same(image, expect_mine(source, tmp_path / "expected"))
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)), opened(image):
            pass
        assert not image.stat().st_mode & 0o222
        found = mount.image()
        assert (found["read_only"], found["copy_on_read"], found["state"]) == (True, False, "off")
        table = Path("/proc/mounts").read_text(errors="replace").split("\n")
        (line,) = [line for line in table if f" {mount.mountpoint} " in line]
        assert line.split()[3].startswith("ro,")
        assert mount.unmount() == 0
    assert (overlay.read_bytes(), overlay.stat().st_mtime_ns) == before


def test_one_overlay_is_read_by_many_and_then_written_by_nobody(source: Origin, overlay: Path, tmp_path: Path) -> None:
    with (
        mounted(overlay, tmp_path / "one", "--read-only") as one,
        mounted(overlay, tmp_path / "two", "-o", "ro") as two,
    ):
        for mount in (one, two):
            assert_same(mount.path("disk.raw"), source.raw)
        (tmp_path / "three").mkdir()
        refused = qedfs("mount", overlay, tmp_path / "three", "--daemon", check=False)
        assert (refused.returncode, "is mounted at" in refused.stderr) == (8, True)


def test_writes_of_a_killed_mount_are_not_passed_over(source: Origin, overlay: Path, tmp_path: Path) -> None:
    """They are in the journal only; a view without them would not be the image that the writer was told of."""
    with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
        write_mine(mount.path("disk.raw"))
        mount.kill()
    before = overlay.read_bytes()
    expected = expect_mine(source, tmp_path / "expected")
    with mounted(overlay, tmp_path / "mnt", "--read-only") as mount:
        assert_same(mount.path("disk.raw"), expected)
        assert mount.unmount() == 0
    assert overlay.read_bytes() == before
    for options in (["--no-stream"], ["--read-only"]):
        with mounted(overlay, tmp_path / "mnt", *options) as mount:
            assert_same(mount.path("disk.raw"), expected)
            assert mount.unmount() == 0


def test_the_commands_on_files_see_the_writes_of_a_killed_mount(overlay: Path, tmp_path: Path) -> None:
    with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
        write_mine(mount.path("disk.raw"))
        mount.kill()
    killed = json.loads(qedfs("map", overlay, "--json").stdout)
    assert [(run["start"], run["length"]) for run in killed if run["data"]] == [(2 * CLUSTER_SIZE, CLUSTER_SIZE)]
    qedfs("export", overlay, tmp_path / "out.raw", "--with-backing")
    assert (tmp_path / "out.raw").read_bytes()[2 * CLUSTER_SIZE : 3 * CLUSTER_SIZE] == MINE
    assert "in a journal: 1 clusters of a killed mount" in qedfs("check", overlay).stdout


def test_a_journal_whose_entries_are_all_in_the_overlay_does_no_harm(
    source: Origin, overlay: Path, tmp_path: Path
) -> None:
    with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
        write_mine(mount.path("disk.raw"))
        with opened(mount.path("disk.raw")) as fd:
            os.fsync(fd)
        mount.kill()
    assert json.loads(qedfs("check", overlay, "--json").stdout)["journal_clusters"] == 0
    with mounted(overlay, tmp_path / "mnt", "--read-only") as mount:
        assert_same(mount.path("disk.raw"), expect_mine(source, tmp_path / "expected"))


def test_nothing_can_be_waited_for(overlay: Path, tmp_path: Path) -> None:
    with mounted(overlay, tmp_path / "mnt", "--read-only") as mount:
        waiting = qedfs("wait", mount.mountpoint, check=False)
        reason = "disk.raw: is read-only and keeps nothing, so it cannot become complete"
        assert (waiting.returncode, waiting.stderr) == (1, f"qedfs: {reason}\n")
        starting = qedfs("stream", "start", mount.mountpoint, check=False)
        assert (starting.returncode, "is read-only" in starting.stderr) == (1, True)


@pytest.mark.parametrize("option", ["--until-streamed", "--copy-on-read"])
def test_what_contradicts_it(overlay: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "mnt").mkdir()
    refused = qedfs("mount", overlay, tmp_path / "mnt", "-o", "ro", option, check=False)
    reason = "--read-only keeps nothing; omit --until-streamed and --copy-on-read"
    assert (refused.returncode, refused.stderr) == (2, f"qedfs: {reason}\n")


@pytest.mark.parametrize("option", ["--standby", "--standby-writes=hold", "--standby-writes=activate"])
def test_it_can_be_put_in_standby_as_little_as_it_takes_writes(overlay: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "mnt").mkdir()
    refused = qedfs("mount", overlay, tmp_path / "mnt", "-o", "ro", option, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert option.replace("=", " ") in refused.stderr
    assert "omit one of them" in refused.stderr
