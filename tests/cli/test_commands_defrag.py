"""`qedfs defrag` where there is no mount, and options that do not go together."""

from __future__ import annotations

from pathlib import Path

from tests.harness.mounts import qedfs


def test_a_control_goes_without_the_options_of_a_start(tmp_path: Path) -> None:
    for option in ("--no-wait", "--limit=1M"):
        done = qedfs("defrag", tmp_path, "disk", "--pause", option, check=False)
        assert (done.returncode, done.stderr) == (2, "qedfs: --pause goes without --limit and --no-wait\n")


def test_without_a_mount_it_says_so(tmp_path: Path) -> None:
    assert qedfs("defrag", tmp_path, "disk", check=False).returncode == 10
