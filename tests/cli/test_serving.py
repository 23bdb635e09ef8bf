"""What a mount says of its overlays once it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.cli.serving import MOST_REMARKS
from tests.harness.mounts import qedfs


@pytest.mark.parametrize("count", [1, MOST_REMARKS + 1, MOST_REMARKS + 2])
def test_a_daemon_names_a_few_overlays_that_are_not_served_and_counts_the_others(tmp_path: Path, count: int) -> None:
    folder, mountpoint = tmp_path / "vms", tmp_path / "mnt"
    folder.mkdir()
    mountpoint.mkdir()
    for number in range(count):
        (folder / f"{number}.qed").write_bytes(b"QED\0" + bytes(1020))
    try:
        said = qedfs("mount", folder, mountpoint, "--daemon").stderr.splitlines()
    finally:
        qedfs("umount", mountpoint, "--if-mounted")
    if count <= MOST_REMARKS + 1:
        assert [line.split(":")[1].strip() for line in said] == [str(folder / f"{n}.qed") for n in range(count)]
    else:
        assert len(said) == MOST_REMARKS + 1
        assert said[-1] == f"qedfs: and {count - MOST_REMARKS} more such overlays: see qedfs status"
