"""`qedfs upgrade` where there is nothing to upgrade. Where there is: `tests/mount/test_holder.py`."""

from __future__ import annotations

from pathlib import Path

from tests.harness.mounts import qedfs


def test_nothing_is_mounted_there(tmp_path: Path) -> None:
    done = qedfs("upgrade", tmp_path, check=False)
    assert done.returncode == 10
    assert "no qedfs mount answers there" in done.stderr
