"""The guide's loop of `stream step`, as it stands there: it ends when all is local, and when a command fails."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from ..harness import starter
from ..harness.hang import HANG_SECONDS
from ..harness.mounts import qedfs
from ..harness.servers import Nginx
from .support import in_mount_table

ROOT = Path(__file__).parents[2]


def run_loop(folder: Path, tmp_path: Path, only: str = "*") -> subprocess.CompletedProcess[str]:
    """Run the block in this folder. Of the commands, those that do not match a shell pattern do nothing."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "contrib/docs/guide.md").read_text(), re.DOTALL)
    (block,) = (text for text in blocks if "qedfs stream step" in text)
    block = block[block.index("mkdir") :]  # the fixture has made the overlay
    program = tmp_path / "bin" / "qedfs"
    program.parent.mkdir()
    text, inherited = starter.program()
    program.write_text(text.replace("\n", f'\ncase "$1" in {only}) ;; *) exit ;; esac\n', 1))
    program.chmod(0o755)
    environ = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-c", block],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
        pass_fds=[inherited],
    )


def test_it_ends_when_all_is_local(web: Nginx, folder: Path, tmp_path: Path) -> None:
    # Eight steps; with the usual clusters, sixty-four.
    qedfs("create", folder / "disk.qed", "--backing", f"{web.url}/disk.img", "--cluster-size", "512K")
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    try:
        done = run_loop(folder, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        qedfs("wait", mountpoint, "--timeout", "1ms")
        qedfs("umount", mountpoint)
    finally:
        if in_mount_table(mountpoint):
            subprocess.run(["umount", "--lazy", mountpoint], check=False)


def test_it_ends_when_the_mount_is_gone(overlay: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "mnt").mkdir()
    done = run_loop(folder, tmp_path, only="stream")
    assert done.returncode == 0
    assert re.fullmatch(r"qedfs: [^\n]+\n", done.stderr)
