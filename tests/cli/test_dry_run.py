"""A dry run of a mounted image: what the command says of the overlay alone, and neither file has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.mounts import mounted, qedfs
from tests.harness.require import require, require_fuse

from .committing import overlay_over, refused
from .test_json import printed


@pytest.mark.parametrize("fmt", ["raw", "qed"])
def test_a_commit_of_a_mounted_image_tells_the_same_as_of_its_overlay(fmt: str, tmp_path: Path) -> None:
    require("qemu-img")
    require_fuse()
    overlay = overlay_over(tmp_path / "disks", fmt)
    files, allow = [overlay, overlay.parent / "base"], ("--allow-backing", str(overlay.parent))

    def state() -> list[object]:
        return [(file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in files]

    with mounted(overlay, tmp_path / "mnt", "--no-stream", *allow) as mount:
        with mount.path("disk.raw").open("r+b", buffering=0) as image:
            image.seek(5 << 20)
            image.write(b"guest" * 10_000)
            os.fsync(image.fileno())
        before = state()
        found = printed("commit", mount.mountpoint, "disk", "--dry-run")
        said = qedfs("commit", mount.mountpoint, "disk", "--dry-run").stdout
        assert state() == before
        with files[1].open("r+b"):
            refused(
                qedfs("commit", mount.mountpoint, "disk", "--dry-run", check=False), 8, "another program has it open"
            )
        assert mount.unmount() == 0
    alone = printed("commit", overlay, *allow, "--dry-run")
    assert found == alone
    assert (found["data"], found["grown"], found["dry_run"]) == (7 * 65536 - 512, 4 * (1 << 20) - 512, True)
    assert said.startswith("disk.raw: has 448 KiB of data and 576 KiB of zeros;")
    assert said.endswith(f"{files[1]}, which would grow by 4.00 MiB\n")
    assert said.partition(":")[2] == qedfs("commit", overlay, *allow, "--dry-run").stdout.removeprefix(f"{overlay}:")


def test_a_defragmentation_of_a_mounted_image_tells_the_same_as_of_its_overlay(tmp_path: Path) -> None:
    require("qemu-img")
    require_fuse()
    overlay, place = overlay_over(tmp_path / "disks"), tmp_path / "mnt"
    with mounted(overlay, place, "--no-stream", "--allow-backing", str(overlay.parent)) as mount:
        with mount.path("disk.raw").open("r+b", buffering=0) as image:
            for at in (9, 3, 6, 4):
                image.seek(at << 20)
                image.write(b"guest" * 10_000)
            os.fsync(image.fileno())
        before = overlay.read_bytes(), overlay.stat().st_mtime_ns, overlay.stat().st_ctime_ns
        found = printed("defrag", place, "disk", "--dry-run")
        assert (overlay.read_bytes(), overlay.stat().st_mtime_ns, overlay.stat().st_ctime_ns) == before
        assert qedfs("defrag", place, "disk", "--dry-run").stdout.startswith("disk.raw: ")
        assert mount.unmount() == 0
    assert found == printed("defrag", overlay, "--dry-run")
    assert (found["dry_run"], found["moved"], 0 < found["to_move"] <= found["data"]) == (True, 0, True)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for option in ("--limit=1M", "--no-wait", "--pause"):
        refused(qedfs("commit", tmp_path, "disk", "--dry-run", option, check=False), 2, "--dry-run goes without")
    refused(qedfs("commit", tmp_path, "disk", "--allow-backing=/", check=False), 2, "a mount has its own")
