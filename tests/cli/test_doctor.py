"""`qedfs doctor` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import qedfs
from tests.harness.require import require_fuse, require_root

from .support import QEDFS

KEYS = {"check", "verdict", "found", "way_out"}


def test_each_check_is_a_line() -> None:
    require_fuse()
    done = qedfs("doctor")
    assert done.stderr == ""
    verdicts = {line[6:26].strip(): line[:6].strip() for line in done.stdout.splitlines()}
    assert {"qedfs", "packages", "libfuse", "libcurl", "kernel", "runtime folder", "fusermount3"} <= set(verdicts)
    assert set(verdicts.values()) <= {"ok", "warn"}


def test_json_has_the_same_findings() -> None:
    require_fuse()
    found = json.loads(qedfs("doctor", "--json").stdout)
    assert found["ok"] is True
    assert all(set(one) == KEYS for one in found["checks"])
    assert {one["verdict"] for one in found["checks"]} <= {"ok", "warn"}
    assert all((one["way_out"] is None) is (one["verdict"] == "ok") for one in found["checks"])


def test_what_fails_decides_the_exit_code(tmp_path: Path) -> None:
    """A machine without /dev/fuse: the same one, in a mount namespace of its own."""
    require_root()
    words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh", *QEDFS, "doctor"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [*words, "--json"], capture_output=True, text=True, timeout=HANG_SECONDS, check=False, env=environment
    )
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["ok"] is False
    failed = [one for one in found["checks"] if one["verdict"] == "fail"]
    assert [one["check"] for one in failed] == ["/dev/fuse"]
    assert "modprobe fuse" in failed[0]["way_out"]


def test_a_url_that_is_none_is_said_before_anything_is_looked_at() -> None:
    for url, said in (
        ("ftp://host/disk", "ftp: is not supported"),
        ("host.example/disk.raw", "begins with its scheme"),
    ):
        done = qedfs("doctor", url, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
