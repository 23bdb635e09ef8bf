"""`qedfs commit`: the backing is what the image was, as with QEMU's own commit; what is refused; kills at each step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.cli.commands.commit import _tell_of_silence
from qedfs.cli.ui.copy_progress import CopyProgress
from tests.harness.images import (
    first_difference,
    qemu_check,
    qemu_info,
    qemu_same,
)
from tests.harness.mounts import mounted, qedfs
from tests.harness.require import require, require_fuse
from tests.harness.sample import sample

from .committing import MIB, SIZE, commit, overlay_over, refused
from .killing import kills
from .test_json import printed


def flat(overlay: Path) -> Path:
    """A copy of the image."""
    copy = overlay.with_suffix(".before")
    subprocess.run(["qemu-img", "convert", "-f", "qed", "-O", "raw", overlay, copy], check=True)
    return copy


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    require("qemu-img")
    return overlay_over(tmp_path / "disks")


@pytest.mark.parametrize("fmt", ["raw", "qed"])
def test_the_backing_is_what_the_image_was_and_what_qemu_would_have_made(fmt: str, tmp_path: Path) -> None:
    overlay, other = (overlay_over(tmp_path / name, fmt) for name in ("ours", "qemus"))
    before = flat(overlay)
    subprocess.run(["qemu-img", "commit", "-q", "-f", "qed", other], check=True)
    found = printed("commit", overlay, "--allow-backing", overlay.parent)
    assert (found["data"], found["zeros"], found["kept"], found["dry_run"]) == (
        5 * 65536 + 65024,
        9 * 65536,
        False,
        False,
    )
    assert qemu_same(overlay.parent / "base", before, fmt=fmt)
    assert qemu_same(overlay.parent / "base", other.parent / "base", fmt=fmt, other_fmt=fmt)
    assert qemu_same(overlay, before)
    assert (qemu_check(overlay), json.loads(qedfs("info", overlay, "--json").stdout)["populated"]) == ((0, 0), 0)
    if fmt == "qed":
        assert qemu_check(overlay.parent / "base", fmt).corruptions == 0
    else:  # zeros are holes, and only what differed was written
        assert found["written"] < found["data"] + found["zeros"]
        assert (overlay.parent / "base").stat().st_blocks <= (8 * MIB - 512 * 1024 + 2 * 65536) // 512 + 16


def test_a_mount_serves_what_was_committed_and_what_was_kept(overlay: Path, tmp_path: Path) -> None:
    """The pin has followed the backing."""
    require_fuse()
    before = flat(overlay)
    for options in (["--keep"], []):
        assert commit(overlay, *options).returncode == 0
        with mounted(overlay, tmp_path / "mnt", "--no-stream", "--allow-backing", overlay.parent) as mount:
            assert first_difference(mount.path("disk.raw"), before) is None
            assert mount.unmount() == 0
    assert "still has its data" in commit(overlay, "--keep").stdout


def test_a_dry_run_says_how_much_and_writes_nothing(overlay: Path) -> None:
    files = [overlay, overlay.parent / "base"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    found = printed("commit", overlay, "--allow-backing", overlay.parent, "--dry-run")
    assert (found["dry_run"], found["kept"]) == (True, True)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert f"{overlay}: has 384 KiB of data and 576 KiB of zeros;" in commit(overlay, "--dry-run").stdout
    assert printed("commit", overlay, "--allow-backing", overlay.parent)["written"] == found["written"]


def test_what_a_killed_mount_had_not_written_to_the_overlay_comes_along(overlay: Path, tmp_path: Path) -> None:
    require_fuse()
    before = bytearray(flat(overlay).read_bytes())
    with mounted(overlay, tmp_path / "mnt", "--no-stream", "--allow-backing", overlay.parent) as mount:
        with mount.path("disk.raw").open("r+b", buffering=0) as image:
            image.seek(5 * MIB)
            image.write(b"acknowledged" * 10_000)
        mount.kill()
    before[5 * MIB : 5 * MIB + 120_000] = b"acknowledged" * 10_000
    assert commit(overlay).returncode == 0
    assert (overlay.parent / "base").read_bytes() == before


def test_after_a_kill_the_image_reads_the_same_and_the_same_command_goes_on(overlay: Path, tmp_path: Path) -> None:
    require_fuse()
    before = flat(overlay)
    killed = list(kills(overlay.parent, sample(7, whole=1), "commit", "FOLDER/disk.qed", "--allow-backing", "FOLDER"))
    assert len(killed) > 3
    states = set()
    for number, folder in enumerate(killed):
        assert qemu_same(folder / "disk.qed", before)
        states.add(json.loads(qedfs("info", folder / "disk.qed", "--json").stdout)["committing"])
        if number == len(killed) // 2:  # a mount takes the backing as it is now
            with mounted(folder / "disk.qed", tmp_path / "mnt", "--no-stream", "--allow-backing", folder) as mount:
                assert first_difference(mount.path("disk.raw"), before) is None
                assert mount.unmount() == 0
        assert commit(folder / "disk.qed").returncode == 0
        assert first_difference(folder / "base", before) is None
        assert qemu_check(folder / "disk.qed").corruptions == 0
        shutil.rmtree(folder)
    assert states == {False, True}


def test_a_file_that_cannot_grow_stops_it_and_nothing_is_lost(overlay: Path) -> None:
    before = flat(overlay)
    words: list[str | Path] = ["prlimit", f"--fsize={9 * MIB}", sys.executable, "-m", "qedfs", "commit", overlay]
    done = subprocess.run([*words, "--allow-backing", overlay.parent], capture_output=True, text=True, check=False)
    refused(done, 6, "base: cannot grow")
    assert qemu_same(overlay, before)
    assert "was interrupted" in qedfs("info", overlay).stdout
    assert commit(overlay).returncode == 0
    assert first_difference(overlay.parent / "base", before) is None
    assert qemu_info(overlay)["virtual-size"] == SIZE


async def test_it_says_once_that_a_disk_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], autojump_clock: trio.testing.MockClock
) -> None:
    progress, waits = CopyProgress("disk.qed"), [False]
    monkeypatch.setattr("qedfs.cli.commands.commit.waits_for_disk", lambda _: waits[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell_of_silence, "disk.qed", progress)
        await trio.sleep(60)  # other work takes its time
        waits[0] = True
        for _ in range(60):  # a slow disk
            progress.add(1)
            await trio.sleep(1)
        assert capsys.readouterr().err == ""
        await trio.sleep(60)
    assert "disk.qed: the commit waits for a disk, or for a file system that is frozen" in capsys.readouterr().err
