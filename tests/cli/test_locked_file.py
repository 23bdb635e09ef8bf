"""What a command needs for the file of an overlay alone. What it says about one: test_overlay_files.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.harness.mounts import qedfs


def test_a_check_loads_nothing_that_reads_images(tmp_path: Path) -> None:
    """That was more than half of its start, and of the check of a large overlay."""
    qedfs("create", tmp_path / "disk.qed", "--size", "1M", "--quiet")
    program = (
        "import sys\nfrom qedfs.cli.main import main\ntry:\n    main(['check', sys.argv[1]])\n"
        "finally:\n    print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "disk.qed"], capture_output=True, text=True, check=True
    )
    assert "sound" in done.stdout
    loaded = done.stdout.split("\n")[-2].split()
    assert "qedfs.overlay.check" in loaded
    assert not {"trio", "rich", "pycurl", "qedfs.overlay.overlay"} & set(loaded)
