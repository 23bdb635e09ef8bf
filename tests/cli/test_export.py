"""`qedfs export`: its forms and formats. What is copied is in test_overlay_export.py and test_mount_export.py."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from ..harness.images import qemu_create, qemu_info, qemu_io, qemu_same
from ..harness.mounts import qedfs


def test_a_qcow2_file_has_the_image_and_its_holes(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=8 << 20)
    qemu_io(path, "write -P 7 1M 192k", "write -z 2M 64k")
    image = hashlib.sha256(bytes(1 << 20) + b"\7" * (192 << 10) + bytes((7 << 20) - (192 << 10))).hexdigest()
    target = folder / "disk.qcow2"
    done = qedfs("export", path, target, "--format", "qcow2", "--verify", image, "--json")
    told = json.loads(done.stdout)
    assert (told["format"], told["read_from"], told["size"], told["data_size"]) == (
        "qcow2",
        "overlay",
        8 << 20,
        192 << 10,
    )
    assert qemu_info(target)["format"] == "qcow2"
    assert qemu_same(path, target, other_fmt="qcow2")
    assert target.stat().st_blocks * 512 < 1 << 20
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    refused = qedfs("export", path, target, "--format", "qcow2", check=False)
    assert (refused.returncode, "--force" in refused.stderr) == (2, True)
    wrong = qedfs("export", path, target, "--format", "qcow2", "--force", "--verify", "0" * 64, check=False)
    assert wrong.returncode == 1
    assert qemu_same(path, target, other_fmt="qcow2")
    assert sorted(os.listdir(folder)) == ["disk.qcow2", "disk.qed"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_without_qemu_img_nothing_is_copied(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=1 << 20)
    done = qedfs("export", path, folder / "disk.qcow2", "--format", "qcow2", check=False, env={"PATH": str(folder)})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "package qemu-utils" in done.stderr
    assert os.listdir(folder) == ["disk.qed"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["disk.qed", "-", "--format", "qcow2"], "name a FILE"),
        (["mnt", "one", "two", "out.raw"], "one two: name one image"),
        (["mnt"], "Missing argument 'FILE'"),
        (["disk.qed", "out.raw", "--format", "vmdk"], "vmdk"),
    ],
)
def test_what_cannot_be_meant(folder: Path, words: list[str], text: str) -> None:
    done = qedfs("export", *words, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert text in done.stderr


def test_no_mount_is_there(folder: Path) -> None:
    assert qedfs("export", folder, "disk", folder / "out.raw", check=False).returncode == 10
    assert os.listdir(folder) == []
