"""The image of an overlay file, as `qedfs export` writes it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qedfs.cli.exporting import overlay_export
from qedfs.cli.main import main

from ..harness.hang import HANG_SECONDS
from ..harness.images import qemu_create, qemu_io, qemu_same, sparse_image
from ..harness.mounts import qedfs
from ..harness.servers import Nginx
from .conftest import SIZE


@pytest.fixture
def overlay(folder: Path) -> Path:
    """Sixteen clusters: data at 1 and 2, zeros at 3 and 4, the rest missing."""
    sparse_image(folder / "base.raw", 1 << 20, {0: b"x" * (1 << 20)})
    path = qemu_create(folder / "disk.qed", folder / "base.raw")
    qemu_io(path, "write -P 7 64k 128k", "write -z 192k 128k")
    return path


def test_export_of_a_complete_overlay_is_sparse(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=8 << 20)
    qemu_io(path, "write -P 7 1M 192k", "write -P 9 5M 64k", "write -z 2M 64k")
    written = json.loads(qedfs("export", path, folder / "disk.raw", "--json").stdout)
    assert (written["size"], written["data_size"]) == (8 << 20, 256 << 10)
    assert qemu_same(path, folder / "disk.raw")
    assert (folder / "disk.raw").stat().st_size == 8 << 20
    assert (folder / "disk.raw").stat().st_blocks * 512 <= 300 << 10


@pytest.mark.parametrize("moment", ["whole_map", "_copy"])
def test_export_of_a_file_whose_name_goes_to_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    path, other = qemu_create(folder / "disk.qed", size=1 << 20), qemu_create(folder / "other.qed", size=1 << 20)
    for overlay, pattern in ((path, 7), (other, 9)):
        qemu_io(overlay, f"write -P {pattern} 0 64k", f"write -P {pattern} 512k 64k")
    whole = getattr(overlay_export, moment)

    def renamed(*args: Any) -> Any:
        if other.exists():
            path.rename(folder / "moved.qed")
            other.rename(path)
        return whole(*args)

    monkeypatch.setattr(overlay_export, moment, renamed)
    with pytest.raises(SystemExit) as end:
        main(["export", str(path), str(folder / "disk.raw")])
    if moment == "_copy":
        assert end.value.code == 0
        assert qemu_same(folder / "moved.qed", folder / "disk.raw")
    else:
        assert end.value.code == 1
        assert "was replaced by another file" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["truncated", "overwritten"])
def test_export_of_a_file_that_is_harmed_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    path = qemu_create(folder / "disk.qed", size=SIZE)
    qemu_io(path, "write -P 7 0 64K", "write -P 8 512K 64K")
    other = qemu_create(folder / "other.qed", size=2 * SIZE)
    os.truncate(other, 4 * SIZE)
    copy = overlay_export._copy

    def copy_and_harm(*args: Any) -> None:
        if harm == "truncated":
            os.truncate(path, path.stat().st_size - 65536)
        else:
            path.write_bytes(other.read_bytes())
        copy(*args)

    monkeypatch.setattr(overlay_export, "_copy", copy_and_harm)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(path), str(folder / "disk.raw")])
    assert ended.value.code == 3
    assert f"was {harm}" in capsys.readouterr().err
    assert not (folder / "disk.raw").exists()


def test_export_of_an_odd_size(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=(1 << 20) + 512)
    qemu_io(path, f"write -P 7 {(1 << 20) - 512} 1k")
    qedfs("export", path, folder / "disk.raw")
    assert (folder / "disk.raw").stat().st_size == (1 << 20) + 512
    assert qemu_same(path, folder / "disk.raw")


def test_export_wants_a_complete_overlay_or_the_backing(web: Nginx, disk: Path, folder: Path) -> None:
    path = folder / "disk.qed"
    qedfs("create", path, "--backing", f"{web.url}/disk.img")
    qemu_io(path, "write -P 7 64k 64k")
    refused = qedfs("export", path, folder / "disk.raw", check=False)
    assert refused.returncode == 1
    assert "--with-backing" in refused.stderr
    assert not (folder / "disk.raw").exists()
    qedfs("export", path, folder / "disk.raw", "--with-backing")
    expected = bytearray(disk.read_bytes())
    expected[65536:131072] = b"\x07" * 65536
    assert (folder / "disk.raw").read_bytes() == expected


def test_export_makes_holes_of_the_zeros_in_the_backing(folder: Path) -> None:
    sparse_image(folder / "base.raw", (8 << 20) + 512, {3 << 20: b"x" * 4096, 8 << 20: b"y" * 512})
    path = qemu_create(folder / "disk.qed", folder / "base.raw", size=(8 << 20) + 512)
    done = qedfs("export", path, folder / "disk.raw", "--with-backing", "--allow-backing", folder, "--json")
    assert json.loads(done.stdout)["data_size"] == (64 << 10) + 512
    assert (folder / "disk.raw").read_bytes() == (folder / "base.raw").read_bytes()
    assert (folder / "disk.raw").stat().st_blocks * 512 <= 100 << 10


def test_export_asks_the_policy(overlay: Path, folder: Path) -> None:
    refused = qedfs("export", overlay, folder / "disk.raw", "--with-backing", check=False)
    assert refused.returncode == 9
    qedfs("export", overlay, folder / "disk.raw", "--with-backing", "--allow-backing", folder)
    assert qemu_same(overlay, folder / "disk.raw")


def test_export_to_a_shorter_source(folder: Path) -> None:
    sparse_image(folder / "base.raw", 100_000, {0: os.urandom(100_000)})
    path = qemu_create(folder / "disk.qed", folder / "base.raw", size=1 << 20)
    qedfs("export", path, folder / "disk.raw", "--with-backing", "--allow-backing", folder)
    data = (folder / "disk.raw").read_bytes()
    assert data == (folder / "base.raw").read_bytes().ljust(1 << 20, b"\0")


def test_export_never_replaces_unless_told(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=1 << 20)
    (folder / "disk.raw").write_text("precious")
    assert qedfs("export", path, folder / "disk.raw", check=False).returncode == 2
    assert (folder / "disk.raw").read_text() == "precious"
    qedfs("export", path, folder / "disk.raw", "--force")
    assert (folder / "disk.raw").stat().st_size == 1 << 20


def test_export_never_replaces_what_is_no_file(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=1 << 20)
    os.mkfifo(folder / "pipe")
    refused = qedfs("export", path, folder / "pipe", "--force", check=False)
    assert refused.returncode == 2
    assert "is not a regular file" in refused.stderr
    assert (folder / "pipe").is_fifo()


def test_export_that_fails_leaves_nothing_behind(web: Nginx, folder: Path) -> None:
    path = folder / "disk.qed"
    qedfs("create", path, "--backing", f"{web.url}/disk.img")
    assert qedfs("export", path, folder / "nowhere" / "disk.raw", "--with-backing", check=False).returncode == 2
    web.stop()
    done = qedfs("export", path, folder / "disk.raw", "--with-backing", "--source-timeout", "300ms", check=False)
    assert done.returncode == 4
    assert [entry.name for entry in folder.iterdir()] == ["disk.qed"]


@pytest.mark.parametrize("complete", [True, False])
def test_export_into_a_pipe_writes_every_byte_in_order(folder: Path, complete: bool) -> None:
    sparse_image(folder / "base.raw", (4 << 20) + 512, {3 << 20: b"x" * 4096, 4 << 20: b"y" * 512})
    path = qemu_create(folder / "disk.qed", None if complete else folder / "base.raw", size=(4 << 20) + 512)
    qemu_io(path, "write -P 7 1M 192k", "write -z 2M 64k")
    options = [] if complete else ["--with-backing", "--allow-backing", str(folder)]
    qedfs("export", path, folder / "disk.raw", *options)
    expected = (folder / "disk.raw").read_bytes()
    digest = hashlib.sha256(expected).hexdigest()
    done = _piped("export", path, "-", *options, "--verify", digest)
    assert (done.returncode, done.stdout == expected, done.stderr) == (0, True, b"")
    done = _piped("export", path, "-", *options, "--verify", f"sha256:{'0' * 64}")
    assert (done.returncode, done.stdout == expected) == (1, True)
    assert done.stderr.decode() == f"qedfs: {path}: its sha256 is {digest}, not {'0' * 64}\n"


def _piped(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "qedfs", *words]
    return subprocess.run(argv, capture_output=True, check=False, timeout=HANG_SECONDS)


def test_export_into_a_pipe_that_nobody_reads_and_a_full_disk(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=4 << 20)
    command = f"{sys.executable} -m qedfs export {path} -"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}; {command} > /dev/full; echo $?"],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert done.stdout == "1\n6\n"
    assert done.stderr == "qedfs: standard output: the file system is full, or allows no larger file\n"
    assert qedfs("export", path, "-", "--json", check=False).returncode == 2


def test_export_gives_a_name_only_to_what_has_the_digest(folder: Path) -> None:
    path = qemu_create(folder / "disk.qed", size=4 << 20)
    qemu_io(path, "write -P 7 1M 192k")
    done = qedfs("export", path, folder / "disk.raw", "--verify", "0" * 64, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert os.listdir(folder) == ["disk.qed"]
    image = bytes(1 << 20) + b"\7" * (192 << 10) + bytes((3 << 20) - (192 << 10))
    qedfs("export", path, folder / "disk.raw", "--verify", f"md5:{hashlib.md5(image).hexdigest()}")
    assert (folder / "disk.raw").read_bytes() == image
    assert (folder / "disk.raw").stat().st_blocks * 512 <= 220 << 10
