"""`qedfs map --missing` of an overlay file; that of a mount is in tests/mount/test_rescue_source.py."""

from __future__ import annotations

import json
from pathlib import Path

from qedfs.overlay.create import create_overlay
from tests.harness.mounts import qedfs


def test_of_an_overlay_file(tmp_path: Path) -> None:
    overlay, alone = tmp_path / "disk.qed", tmp_path / "alone.qed"
    create_overlay(str(overlay), image_size=1 << 20, backing="http://host/disk.raw")
    create_overlay(str(alone), image_size=1 << 20, backing=None)
    extent = {"start": 0, "length": 1 << 20, "depth": 1, "present": False, "zero": False, "data": False}
    assert json.loads(qedfs("map", overlay, "--missing", "--json").stdout) == [extent]
    assert json.loads(qedfs("map", alone, "--missing", "--json").stdout) == []
    done = qedfs("map", overlay, "--missing")
    assert (done.stdout, done.stderr) == ("0 1048576\n", "1.00 MiB missing, in 1 part\n")


def test_what_makes_no_sense_is_one_line(tmp_path: Path) -> None:
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=1 << 20, backing=None)
    cases: list[list[str | Path]] = [
        [overlay, "disk"],
        [overlay, "--missing", "--png", "map.png"],
        [tmp_path, "--missing"],
    ]
    for words in cases:
        done = qedfs("map", *words, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
