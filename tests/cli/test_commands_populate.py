"""`qedfs populate`: what it refuses before it asks a mount. What it does is in tests/mount/test_rescue_source.py."""

from __future__ import annotations

from pathlib import Path

from tests.harness.mounts import qedfs


def test_a_copy_has_to_be_named(tmp_path: Path) -> None:
    done = qedfs("populate", tmp_path, "disk", check=False)
    assert done.returncode == 2
    assert "--from" in done.stderr


def test_nothing_is_mounted_there(tmp_path: Path) -> None:
    done = qedfs("populate", tmp_path, "disk", "--from", tmp_path / "backup", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (10, 1)
