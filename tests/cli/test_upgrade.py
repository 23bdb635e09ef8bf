"""`qedfs upgrade` where there is nothing to upgrade. Where there is: `tests/mount/test_holder.py`."""

from __future__ import annotations

from pathlib import Path

from tests.harness.mounts import qedfs


def test_nothing_is_mounted_there(tmp_path: Path) -> None:
    """As for every other command that is given a mountpoint."""
    file = tmp_path / "disk.qed"
    file.touch()
    for place, code, text in (
        (tmp_path, 10, "nothing is mounted there"),
        (tmp_path / "none", 2, "there is no such folder"),
        (file, 2, "name the folder where it is mounted, not the overlay"),
    ):
        done = qedfs("upgrade", place, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1)
        assert f"{place}: " in done.stderr
        assert text in done.stderr
