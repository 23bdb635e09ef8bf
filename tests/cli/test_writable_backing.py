"""Which backing a command writes to: a local file, allowed, of the pinned version, that nobody else has open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.images import qemu_create
from tests.harness.mounts import mounted, qedfs
from tests.harness.require import require, require_fuse

from .committing import MIB, commit, overlay_over, refused


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    require("qemu-img")
    return overlay_over(tmp_path / "disks")


def test_whoever_reads_the_backing_is_not_surprised(overlay: Path, tmp_path: Path) -> None:
    require_fuse()
    other = qemu_create(tmp_path / "other.qed", overlay.parent / "base")
    before = (overlay.parent / "base").read_bytes()
    with mounted(other, tmp_path / "mnt", "--no-stream", "--allow-backing", overlay.parent) as mount:
        mount.path("other.raw").read_bytes()[:1]
        refused(commit(overlay), 8, "another program has it open, such as a mount of it, or of an overlay over it")
        assert mount.unmount() == 0
    with mounted(overlay, tmp_path / "mnt", "--no-stream", "--allow-backing", overlay.parent):
        refused(commit(overlay), 8, "is mounted at")
    script = "import fcntl,struct,sys; f=open(sys.argv[1],'rb'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, overlay.parent / "base"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        refused(commit(overlay), 8, "another program has it open")
        reader.communicate(b"\n")
    assert (overlay.parent / "base").read_bytes() == before


def test_refusals(overlay: Path, tmp_path: Path) -> None:
    base = overlay.parent / "base"
    refused(qedfs("commit", overlay, check=False), 9, f"--allow-backing {base} would allow it")
    refused(qedfs("commit", overlay, "--allow-backing", tmp_path / "else", check=False), 9, "outside every")
    remote = qemu_create(tmp_path / "remote.qed", size=MIB)
    refused(qedfs("commit", remote, check=False), 2, "is complete, and has no backing")
    words = ["--backing", "http://127.0.0.1:1/disk", "--size", "1M", "--offline", "--quiet"]
    qedfs("create", tmp_path / "http.qed", *words)
    refused(qedfs("commit", tmp_path / "http.qed", check=False), 2, "is on a server, and only read")
    words = ["--backing", "/dev/null", "--backing-format", "raw", "--size", "1M", "--offline", "--quiet"]
    qedfs("create", tmp_path / "device.qed", *words)
    done = qedfs("commit", tmp_path / "device.qed", "--allow-backing", "/dev/null", check=False)
    refused(done, 2, "is not a regular file; qemu-img commit writes to devices")
    saved = base.read_bytes()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"], check=True)
    unnamed = tmp_path / "unnamed.qed"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", "-b", base, "-F", "qcow2", unnamed], check=True)
    refused(qedfs("commit", unnamed, "--allow-backing", base, check=False), 4, "is a qcow2 image, which is only read")
    base.write_bytes(saved)
    qedfs("commit", overlay, "--allow-backing", base, "--keep", "--quiet")  # now it is pinned
    os.utime(base)
    refused(commit(overlay), 5, "is not the version that this overlay was started from")
    base.unlink()
    refused(commit(overlay), 4, "No such file or directory")
