"""What anybody mounts anywhere, and the name of a mountpoint itself, stand in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.harness.hang import HANG_SECONDS
from tests.harness.require import require, require_fuse, require_root
from tests.host.test_procfs import NAMES

from .support import MIB, create, origin

# In a table of mounts of its own: an older qedfs on this machine could not read one with such names in it.
ALONE = ("unshare", "--mount", "--propagation", "private")
SCRIPT = """
overlay=$1 mountpoint=$2 python=$3 raw=$4
shift 4
for place; do mount -t tmpfs tmpfs "$place" || exit 39; done
"$python" -m qedfs mount "$overlay" "$mountpoint" --daemon --no-stream || exit 40
cmp -n 1048576 "$mountpoint/disk.raw" "$raw" || exit 41
"$python" -m qedfs status "$mountpoint" || exit 42
(cd "$mountpoint" && exec sleep 60) & holder=$!
while [ "$(readlink /proc/$holder/cwd)" != "$mountpoint" ]; do sleep 0.01; done
"$python" -m qedfs umount "$mountpoint" 2>&1 | grep -F "is in use by pid $holder (s" || exit 43
kill $holder
wait $holder
"$python" -m qedfs umount "$mountpoint" || exit 44
"$python" -m qedfs umount "$mountpoint"
[ $? = 10 ] || exit 45
"""


def test_a_mount_lives_beside_and_at_any_name(tmp_path: Path) -> None:
    require("unshare")
    require_root()
    require_fuse()
    mountpoint = tmp_path / "mnt" / "".join(NAMES)
    others = [tmp_path / "others" / name for name in NAMES]
    for folder in (mountpoint, *others):
        folder.mkdir(parents=True)
    with origin(tmp_path, MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        done = subprocess.run(
            [*ALONE, "sh", "-c", SCRIPT, "sh", overlay, mountpoint, sys.executable, source.raw, *others],
            check=False,
            capture_output=True,
            errors="replace",
            timeout=HANG_SECONDS,
            env={**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "de"},
        )
        assert done.returncode == 0, done.stderr + done.stdout
