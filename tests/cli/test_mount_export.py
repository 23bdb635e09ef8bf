"""The image of a mount is exported as it is at one moment: by a snapshot, or through the mount if nobody writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qedfs.cli.exporting import image_export, mount_export
from qedfs.cli.main import main
from tests.harness.images import qemu_same, random_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.mount import test_snapshot as snapshots
from tests.mount.support import MIB, assert_same, create, opened, origin

SIZE = 2 * MIB


@pytest.fixture
def mount(folder: Path, mountpoint: Path) -> Iterator[Mount]:
    """A complete image of random bytes on a file system that cannot share blocks."""
    qedfs("create", folder / "disk.qed", "--size", str(SIZE))
    with mounted(folder, mountpoint) as mount:
        random_image(folder / "random", SIZE)
        with opened(mount.path("disk.raw")) as fd:
            os.pwrite(fd, (folder / "random").read_bytes(), 0)
        yield mount


def told(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qedfs("export", *words, "--json").stdout)
    return found


def test_an_image_that_nobody_writes_to_is_read_through_the_mount(mount: Mount, folder: Path) -> None:
    digest = hashlib.sha256((folder / "random").read_bytes()).hexdigest()
    with opened(mount.path("disk.raw")):  # for writing, but nobody does
        done = told(mount.mountpoint, "disk", folder / "out", "--verify", digest)
    assert (done["read_from"], done["overlay"]) == ("image", str(folder / "disk.qed"))
    assert_same(folder / "out", folder / "random")
    done = told(mount.mountpoint, "disk.raw", folder / "out.qcow2", "--format", "qcow2")
    assert qemu_same(folder / "out", folder / "out.qcow2", fmt="raw", other_fmt="qcow2")
    words: list[str | Path] = [
        sys.executable,
        "-m",
        "qedfs",
        "export",
        mount.mountpoint,
        "disk.qed",
        "-",
        "--verify",
        digest,
    ]
    piped = subprocess.run(words, capture_output=True, check=True)
    assert piped.stdout == (folder / "random").read_bytes()
    assert sorted(os.listdir(folder)) == ["disk.qed", "out", "out.qcow2", "random"]


@pytest.mark.parametrize("mapped", [False, True])
def test_a_guest_that_writes_meanwhile_ends_it(
    mount: Mount, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mapped: bool
) -> None:
    """What is written through a mapping is in the kernel's pages only, until the export asks for a sync."""
    read_next = image_export._read_next

    with opened(mount.path("disk.raw")) as guest, mmap.mmap(guest, SIZE) as pages:

        def read_and_write(fd: int, path: str, pos: int, size: int) -> tuple[int, bytes]:
            found = read_next(fd, path, pos, size)
            if pos and mapped:
                pages[4711:4712] = b"!"
            elif pos:
                os.pwrite(guest, b"!", 4711)
            return found

        monkeypatch.setattr(image_export, "_read_next", read_and_write)
        _refused(mount, folder, capsys)


def _refused(mount: Mount, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(mount.mountpoint), "disk", str(folder / "out")])
    assert ended.value.code == 8
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "was written to while it was copied" in said
    assert "XFS with reflink or Btrfs" in said
    assert sorted(os.listdir(folder)) == ["disk.qed", "random"]


def test_what_the_mount_cannot_give(folder: Path, mountpoint: Path) -> None:
    create(folder / "disk.qed", "nbd://127.0.0.1:9/", "--size", "1M", "--offline")
    create(folder / "later.qed", "nbd://127.0.0.1:9/", "--size", "1M", "--offline", "--standby")
    with mounted(folder, mountpoint, "--no-stream"):
        for words, exit_code, text in (
            (["disk"], 1, "disk.raw: 1.00 MiB is still missing"),
            (["later"], 1, "is in standby"),
            (["other"], 2, "has no image other"),
        ):
            done = qedfs("export", mountpoint, *words, folder / "out", check=False)
            assert (done.returncode, done.stderr.count("\n")) == (exit_code, 1)
            assert text in done.stderr
    assert sorted(os.listdir(folder)) == ["disk.qed", "later.qed"]


def test_by_a_snapshot_while_a_guest_writes_and_the_stream_runs(tmp_path: Path) -> None:
    with origin(tmp_path, SIZE) as source, snapshots.sharing(tmp_path, "xfs") as place:
        create(place / "disk.qed", source.url)
        with mounted(place, tmp_path / "mnt", "--limit", "512K") as mount:
            with snapshots.Numbered(mount.path("disk.raw"), SIZE) as guest:
                before = guest.returned
                done = told(mount.mountpoint, "disk", tmp_path / "out", "--with-backing")
                after = guest.returned
            assert os.listdir(place) == ["disk.qed"]
        assert done["read_from"] == "snapshot"
        found = (tmp_path / "out").read_bytes()
        assert any(found == model for model in snapshots.models(source.data(), guest, before, after))


class Server:
    """A server that makes a snapshot, an empty file."""

    def execute(self, name: str, **arguments: Any) -> Any:
        if name == "x-qedfs-snapshot":
            Path(arguments["file"]).touch()
            return {}
        image = {"name": "disk.raw", "overlay": self.overlay, "served": True, "state": "complete", "backing": None}
        return {"images": [{**image, "total": 0, "populated": 0}], "released": []}

    def __init__(self, overlay: Path) -> None:
        self.overlay = str(overlay)


def test_the_snapshot_goes_whatever_becomes_of_the_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def connect(_: str) -> Iterator[Server]:
        yield Server(folder / "disk.qed")

    monkeypatch.setattr(mount_export, "lasting_client", connect)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folder), "disk", str(folder / "out")])
    assert ended.value.code == 3  # an empty file is no overlay
    assert os.listdir(folder) == []
