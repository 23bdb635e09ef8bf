"""Mounts on machines whose /run, /dev/shm or /tmp is not what we would like; each in a table of mounts of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qedfs.host.runtime import RUN
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import mounted, qedfs
from tests.harness.require import require, require_fuse, require_root
from tests.mount.support import MIB, create, origin

SCRIPT = r"""
python=$1 overlay=$2 mountpoint=$3 xdg=$4 spoil=$5 place=$6
eval "$spoil" || exit 39
XDG_RUNTIME_DIR=$xdg "$python" -m qedfs mount "$overlay" "$mountpoint" --daemon --no-stream || exit 40
unset XDG_RUNTIME_DIR
socket=$("$python" -m qedfs status "$mountpoint" --json | sed -n 's/.*"socket": "\(.*\)".*/\1/p')
case $socket in "$place"/*) ;; *) echo "$socket"; exit 41 ;; esac
[ -S "$socket" ] || exit 41
printf x | dd of="$mountpoint/disk.raw" conv=notrunc status=none || exit 42
"$python" -m qedfs umount "$mountpoint" || exit 43
[ ! -e "${socket%/*}" ] || exit 44
"""


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        ("mount -t tmpfs -o ro tmpfs /run", "$xdg/qedfs"),
        ("xdg=; mount -t tmpfs -o ro tmpfs /run", "/tmp/qedfs-0"),
        (
            # Over /tmp and not in its place: the checkout, and the Python that runs this, may be below it.
            "mount -t tmpfs -o ro tmpfs /run; mount -t tmpfs tmpfs $xdg; mkdir -m 1777 $xdg/upper $xdg/work; "
            "mount -t overlay -o lowerdir=/tmp,upperdir=$xdg/upper,workdir=$xdg/work overlay /tmp; "
            "install -d -o 61001 /tmp/qedfs-0; xdg=",
            "/dev/shm/qedfs-0",
        ),
        # Where /run is no tmpfs, anybody may take root's name in /dev/shm.
        ("mount -t tmpfs tmpfs /dev/shm; install -d -o 61001 /dev/shm/qedfs-0", "/run/qedfs"),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", "/run/qedfs"),
    ],
)
def test_a_mount_finds_a_place_and_its_commands_find_it(tmp_path: Path, spoil: str, place: str) -> None:
    require_root()
    require_fuse()
    folder = Path("/var/tmp") / f"qedfs-places-{os.getpid()}"  # not below a folder that is spoilt
    xdg, mountpoint = folder / "xdg", folder / "mnt"
    mountpoint.mkdir(parents=True)
    xdg.mkdir()
    try:
        with origin(tmp_path, MIB) as source:
            overlay = create(folder / "disk.qed", source.url)
            words: list[str | Path] = [sys.executable, overlay, mountpoint, xdg, spoil, place.replace("$xdg", str(xdg))]
            done = subprocess.run(
                [require("unshare"), "--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh", *words],
                check=False,
                capture_output=True,
                text=True,
                timeout=HANG_SECONDS,
            )
            assert done.returncode == 0, done.stderr + done.stdout
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", folder], check=True)


def test_a_mountpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    require_root()
    require_fuse()
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    folder = RUN / "qedfs" / hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
    with origin(tmp_path, MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        qedfs("mount", overlay, mountpoint, "--daemon", "--no-stream")
        assert (folder / "log").exists()
        assert qedfs("mount", overlay, mountpoint, "--daemon", check=False).returncode == 8
        qedfs("status", mountpoint)
        qedfs("umount", mountpoint)
        assert not folder.exists()
        assert qedfs("status", mountpoint, check=False).returncode == 10
        assert qedfs("mount", tmp_path / "none.qed", mountpoint, "--daemon", check=False).returncode == 2
        assert not folder.exists()
        with mounted(overlay, mountpoint, "--no-stream") as mount:
            assert mount.unmount() == 0
        assert not folder.exists()
