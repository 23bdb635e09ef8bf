"""`qedfs rebase`: the same disk elsewhere is taken, another one is not, and QEMU reads the overlay over it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.harness.images import qemu_check, qemu_info, qemu_io, qemu_same, random_image
from tests.harness.mounts import mounted, qedfs
from tests.harness.servers import nginx

from .test_json import printed

MIB = 1 << 20


def info(overlay: Path) -> dict[str, object]:
    return dict(json.loads(qedfs("info", overlay, "--json").stdout))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """An overlay that has read a part of `disk` from a mount, which knows what it has read."""
    raw = random_image(tmp_path / "disk", 4 * MIB)
    overlay = tmp_path / "disk.qed"
    qedfs("create", overlay, "--backing", raw, "--quiet")
    with mounted(overlay, tmp_path / "mnt", "--no-stream", "--allow-backing", tmp_path) as mount:
        with mount.path("disk.raw").open("rb") as image:
            assert len(image.read(MIB)) == MIB
        assert mount.unmount() == 0
    return overlay


def test_the_same_disk_elsewhere_is_taken_and_another_one_is_not(begun: Path, tmp_path: Path) -> None:
    www = tmp_path / "www"
    www.mkdir()
    shutil.copy(tmp_path / "disk", www / "mirror")
    other = bytearray((tmp_path / "disk").read_bytes())
    for pos in range(0, 4 * MIB, 3 * 4096):  # a clone: a third of its blocks differ
        other[pos : pos + 8] = b"changed!"
    (www / "other").write_bytes(other)
    (www / "short").write_bytes(other[:MIB])
    before = info(begun)
    with nginx(www) as server:
        for name in ("other", "short"):
            for force in ((), ("--force",)):
                done = qedfs("rebase", begun, "--backing", f"{server.url}/{name}", *force, check=False)
                assert (done.returncode, done.stderr.count("\n")) == (5, 1)
        assert info(begun) == before
        done = qedfs("rebase", begun, "--backing", f"{server.url}/none", "--source-timeout", "1s", check=False)
        assert done.returncode == 4
        found = printed("rebase", begun, "--backing", f"{server.url}/mirror")
        assert found == {"overlay": str(begun), "backing": f"{server.url}/mirror", "compared": True}
        assert str(tmp_path / "disk").encode() not in begun.read_bytes()[:65536]
        assert qemu_check(begun).corruptions == 0
        assert qemu_info(begun)["backing-filename"] == f"{server.url}/mirror"
        (tmp_path / "disk").rename(tmp_path / "moved")
        with mounted(begun, tmp_path / "mnt") as mount:
            mount.wait()
            assert mount.unmount() == 0
    assert qemu_same(begun, tmp_path / "moved")
    done = qedfs("rebase", begun, "--backing", "", check=False)
    assert (done.returncode, "is complete" in done.stderr) == (2, True)


def test_unsafe_contacts_nothing_and_forgets_the_version(begun: Path, tmp_path: Path) -> None:
    qedfs("rebase", begun, "--unsafe", "--backing", "nbd://203.0.113.1/disk")
    found = info(begun)
    assert (found["backing"], found["pin"]) == ("nbd://203.0.113.1/disk", None)
    shutil.move(tmp_path / "disk", tmp_path / "elsewhere")
    done = qedfs("rebase", begun, "--backing", tmp_path / "elsewhere", check=False)
    assert (done.returncode, "--force" in done.stderr) == (4, True)  # nothing is known any more to compare it with
    assert qedfs("rebase", begun, "--backing", "elsewhere", "--force").stdout.startswith(f"{begun}: its backing is ")
    assert qemu_same(begun, tmp_path / "elsewhere")


def test_without_a_backing_only_if_nothing_is_missing(begun: Path, tmp_path: Path) -> None:
    done = qedfs("rebase", begun, "--backing", "", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is still missing, and would read as zeros" in done.stderr
    qemu_io(begun, f"write -P 5 0 {4 * MIB}")
    assert qedfs("rebase", begun, "--backing", "").stdout == f"{begun}: needs no backing now\n"
    assert "backing-filename" not in qemu_info(begun)
    qemu_io(begun, f"read -P 5 0 {4 * MIB}")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--backing", "http://user:hunter2@h/disk"), "chmod 600"),
        (("--backing", "h" * 5000, "--unsafe"), "longer than"),
        (("--backing", "x", "--unsafe", "--force"), "--force has no meaning"),
    ],
)
def test_refusals(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    qedfs("create", tmp_path / "disk.qed", "--offline", "--size", "1M", "--backing", "http://h/x", "--quiet")
    done = qedfs("rebase", tmp_path / "disk.qed", *words, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert text in done.stderr
    assert "hunter2" not in done.stderr


def test_a_path_is_relative_to_the_folder_that_links_lead_to(tmp_path: Path) -> None:
    """As it is for a mount, and for QEMU."""
    (tmp_path / "pool" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("pool/sub")
    random_image(tmp_path / "disk", MIB)
    right = random_image(tmp_path / "pool" / "disk", 2 * MIB)
    assert printed("create", tmp_path / "link" / "disk.qed", "--backing", "../disk")["size"] == 2 * MIB
    right.rename(tmp_path / "pool" / "moved")
    random_image(tmp_path / "moved", MIB)
    qedfs("rebase", tmp_path / "link" / "disk.qed", "--backing", "../moved")
    pin = info(tmp_path / "pool" / "sub" / "disk.qed")["pin"]
    assert isinstance(pin, dict)
    assert pin["size"] == 2 * MIB
