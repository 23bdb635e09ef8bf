"""`check` in its plain form finds what it finds with click."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.mounts import qedfs

from .support import plain, with_click


@pytest.mark.parametrize("what", ["sound", "damaged", "missing"])
def test_an_overlay(what: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    if what != "missing":
        qedfs("create", path, "--size", "1M")
    if what == "damaged":
        with path.open("r+b") as file:
            file.seek(65536)
            file.write(b"\xff" * 8)  # the first entry of L1
    found = plain("check", path)
    assert found == with_click("check", path)
    assert found[0] == {"sound": 0, "damaged": 3, "missing": 2}[what]
