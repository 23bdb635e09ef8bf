"""The fake server as a process of its own, judged by clients that are not ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.nbd_behaviours import BEHAVIOURS, WELL_BEHAVED
from tests.harness.hang import HANG_SECONDS
from tests.harness.process import Child
from tests.harness.require import require
from tests.source.nbd.support import MiB, opened, read, sparse_content

CONTENT = sparse_content(4 * MiB)
ROOT = Path(__file__).parents[3]
HONEST = ["correct", "multi-conn", "simple-replies", "pieces-backwards", "blocks-of-512", "blocks-small-maximum"]


def _start(tmp_path: Path, *options: str) -> tuple[Child, str]:
    file = tmp_path / "disk"
    file.write_bytes(CONTENT)
    argv: list[str | Path] = [sys.executable, "-m", "tests.fakes.nbd_server", "--file", file, *options]
    child = Child(argv, tmp_path / "log", env={"PYTHONPATH": str(ROOT)})
    child.wait_until(lambda: child.output().endswith("\n"), "the URL")
    return child, child.output().strip()


@pytest.mark.parametrize("name", HONEST)
def test_qemu_reads_it_right(name: str, tmp_path: Path) -> None:
    assert name in WELL_BEHAVED
    child, url = _start(tmp_path, "--behaviour", name, "--unix", str(tmp_path / "s"))
    try:
        compare: list[str | Path] = [require("qemu-img"), "compare", "-f", "raw", "-F", "raw", tmp_path / "disk", url]
        subprocess.run(compare, check=True, capture_output=True, timeout=HANG_SECONDS)
    finally:
        child.kill()


async def test_it_serves_at_a_port(tmp_path: Path) -> None:
    child, url = _start(tmp_path, "--export", "disk")
    try:
        async with opened(url) as source:
            assert await read(source, 5, 5000) == CONTENT[5:5005]
    finally:
        child.kill()


def test_every_behaviour_can_be_chosen(tmp_path: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "tests.fakes.nbd_server", "--list"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert listed.stdout.split() == list(BEHAVIOURS)
    assert len(BEHAVIOURS) > 100
