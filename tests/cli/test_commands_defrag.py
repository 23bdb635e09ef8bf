"""`qedfs defrag` of a file: it reads as before, for QEMU, too, also after a kill. Options that do not go together."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from qedfs.cli.commands.defrag import _in_file
from qedfs.errors import NoSpace
from qedfs.jobs.defrag import DefragJob
from qedfs.jobs.job import Job
from tests.harness.images import qemu_check, qemu_io, qemu_same, random_image
from tests.harness.mounts import qedfs
from tests.harness.require import require
from tests.harness.sample import sample

from .committing import refused
from .killing import kills
from .test_json import printed

SIZE = 3 << 20
CLUSTER = 1 << 16
ORDER = (5, 2, 40, 3, 17, 4, 31, 6)  # of the writes to a part of a cluster each
# Runs the command in a process that gets SIGINT in the middle of a move, whose first entry has just been set.
INTERRUPTED = """
import os, signal, sys
from qedfs.cli.entry import main
from qedfs.overlay.clustermap import ClusterMap

def move(self, *args):
    moved(self, *args)
    ClusterMap.move = moved
    os.kill(os.getpid(), signal.SIGINT)

moved, ClusterMap.move = ClusterMap.move, move
sys.argv = ["qedfs", "defrag", sys.argv[1]]
main()
"""


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An overlay that was filled in the order of chance."""
    require("qemu-img")
    folder = tmp_path / "disks"
    folder.mkdir()
    random_image(folder / "base", SIZE)
    # With the tables first, all data was in one row.
    options = ("--backing", "base", "--backing-format", "raw", "--preallocation", "metadata")
    qedfs("create", folder / "disk.qed", *options, "--size", str(SIZE))
    qemu_io(folder / "disk.qed", *(f"write -P {at} {at * CLUSTER + 512} 4k" for at in ORDER))
    return folder / "disk.qed"


def flat(overlay: Path) -> Path:
    """A copy of the image."""
    copy = overlay.with_suffix(".before")
    subprocess.run(["qemu-img", "convert", "-f", "qed", "-O", "raw", overlay, copy], check=True)
    return copy


def test_the_image_reads_as_before_and_is_in_one_piece(overlay: Path) -> None:
    before, bytes_before = flat(overlay), overlay.read_bytes()
    told = qedfs("defrag", overlay, "--dry-run").stdout
    assert told == f"{overlay}: 512 KiB of data in 8 pieces, the longest 64.0 KiB; 512 KiB not in order\n"
    assert overlay.read_bytes() == bytes_before
    moved = 2 * len(ORDER) * CLUSTER  # to the end of the file and back
    assert printed("defrag", overlay, "--limit", "1G") == {
        "overlay": str(overlay),
        "dry_run": False,
        "data": len(ORDER) * CLUSTER,
        "pieces_before": len(ORDER),
        "pieces": 1,
        "longest_piece": len(ORDER) * CLUSTER,
        "to_move": 0,
        "moved": moved,
    }
    assert qemu_same(overlay, before)
    assert qemu_check(overlay) == (0, 0)
    assert overlay.stat().st_size == len(bytes_before)
    assert "in 1 piece, before in 1 piece; moved 0" in qedfs("defrag", overlay).stdout


def test_after_a_kill_the_image_reads_the_same_and_the_same_command_goes_on(overlay: Path) -> None:
    before = flat(overlay)
    killed = list(kills(overlay.parent, sample(3, whole=1), "defrag", "FOLDER/disk.qed"))
    assert len(killed) > 3
    for folder in killed:
        assert qemu_same(folder / "disk.qed", before)
        assert qemu_check(folder / "disk.qed").corruptions == 0
        qedfs("defrag", folder / "disk.qed")
        assert qemu_same(folder / "disk.qed", before)
        assert qemu_check(folder / "disk.qed") == (0, 0)
        assert json.loads(qedfs("info", folder / "disk.qed", "--json").stdout)["pieces"] == 1
        shutil.rmtree(folder)


def test_ctrl_c_interrupts_no_move_and_leaves_no_entry_without_its_data(overlay: Path) -> None:
    before = flat(overlay)
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, overlay], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert qemu_check(overlay).corruptions == 0
    assert qemu_same(overlay, before)


def test_a_file_that_cannot_grow_stops_it_and_nothing_is_lost(overlay: Path) -> None:
    before, size = flat(overlay), overlay.stat().st_size
    words = ["prlimit", f"--fsize={size + 4 * CLUSTER}", "python3", "-m", "qedfs", "defrag", str(overlay)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    refused(done, 6, "what is in order stays so, and the rest needs 128 MiB of free space")
    assert qemu_same(overlay, before)
    assert qemu_check(overlay).corruptions == 0


def test_a_disk_that_is_full_at_its_end_ends_it_instead_of_a_wait_that_nobody_sees(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(job: DefragJob) -> None:
        raise NoSpace("the file system is full")

    monkeypatch.setattr(DefragJob, "finish", full)
    monkeypatch.setattr(logging.getLogger(Job.__module__), "filters", [])  # to which the command adds one
    with pytest.raises(NoSpace, match="the file system is full"):
        trio.run(_in_file, str(overlay), 0, True)


def test_an_overlay_that_is_in_use_is_left_alone(overlay: Path) -> None:
    with subprocess.Popen(
        ["qemu-io", "-f", "qed", overlay], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write("read 0 512\n")
        user.stdin.flush()
        user.stdout.readline()
        refused(qedfs("defrag", overlay, check=False), 8, "is in use")
        user.stdin.close()


def test_options_are_for_a_file_or_for_a_mount(tmp_path: Path) -> None:
    for option in ("--no-wait", "--limit=1M"):
        done = qedfs("defrag", tmp_path, "disk", "--pause", option, check=False)
        assert (done.returncode, done.stderr) == (2, "qedfs: --pause goes without --limit and --no-wait\n")
    for option in ("--no-wait", "--pause"):
        refused(qedfs("defrag", tmp_path, option, check=False), 2, "are for a mounted image: MOUNTPOINT IMAGE")
    refused(qedfs("defrag", tmp_path, "disk", "--dry-run", "--pause", check=False), 2, "--dry-run goes without")


def test_without_a_mount_it_says_so(tmp_path: Path) -> None:
    assert qedfs("defrag", tmp_path, "disk", check=False).returncode == 10
