"""`qedfs resize` of a file: what it takes, prints and refuses. Of a mount: tests/mount/test_grow_mounted.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from qedfs.cli.commands.resize import target_size
from qedfs.errors import UsageError
from tests.harness.images import qemu_check, qemu_create, qemu_info, qemu_io, random_image
from tests.harness.mounts import qedfs

from .test_json import printed

MIB = 1 << 20


@pytest.mark.parametrize(("text", "size"), [("20M", 20 * MIB), ("+20M", 25 * MIB), ("-4M", MIB), ("5242880", 5 * MIB)])
def test_a_size_as_it_is_typed(text: str, size: int) -> None:
    assert target_size(text, 5 * MIB) == size


@pytest.mark.parametrize("text", ["", "+", "++1M", "1X", "large", "--1"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        target_size(text, MIB)


def test_what_qemu_made_grows_and_shrinks_and_qemu_agrees(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "disk", MIB)
    overlay = qemu_create(tmp_path / "disk.qed", raw)
    qemu_io(overlay, "write -P 7 1040384 8192")
    done = qedfs("resize", overlay, "+7M", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (9, 1)
    assert "--allow-backing" in done.stderr  # it has to be asked for its size
    found = printed("resize", overlay, "+7M", "--allow-backing", tmp_path)
    assert found == {"overlay": str(overlay), "image": None, "size": 8 * MIB, "size_before": MIB}
    assert (qemu_info(overlay)["virtual-size"], qemu_check(overlay)) == (8 * MIB, (0, 0))
    # A relative size is told as an absolute one, with which a command that was killed can be repeated.
    told = qedfs("resize", overlay, "+512", "--allow-backing", tmp_path).stderr
    assert (
        told
        == f"qedfs: {overlay}: +512 asks for {8 * MIB + 512} bytes; if this is broken off, repeat it with that size\n"
    )
    assert qedfs("resize", overlay, str(8 * MIB + 512)).stderr == ""  # again
    assert qedfs("resize", "--shrink", overlay, "--quiet", "--", "-512").stderr == ""
    qemu_io(overlay, f"read -P 0 {MIB} {7 * MIB}", f"write -P 9 {8 * MIB - 512} 512")
    done = qedfs("resize", overlay, "2M", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--shrink" in done.stderr
    done = qedfs("resize", "--shrink", overlay, "2M", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{overlay}: has data past 2097152 bytes, in the cluster at 8323072" in done.stderr
    qemu_io(overlay, f"write -z {8 * MIB - 65536} 65536")
    assert qedfs("resize", "--shrink", overlay, "--", "-6M").stdout == (
        f"{overlay}: 2.00 MiB (2097152 bytes), before 8.00 MiB\n"
    )
    assert qemu_info(overlay)["virtual-size"] == 2 * MIB
    assert qemu_check(overlay).corruptions == 0
    qemu_io(overlay, "read -P 7 1040384 8192", f"read -P 0 {MIB} {MIB}")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("1000",), "multiple of 512"),
        (("100T",), "tables of this overlay can map, which is 70368744177664"),
        (("a", "b", "c"), "usage: qedfs resize"),
        (("--shrink", "disk", "1M"), "not mounted"),
    ],
)
def test_refusals(words: tuple[str, ...], text: str, tmp_path: Path) -> None:
    qedfs("create", tmp_path / "disk.qed", "--size", "512", "--quiet")
    done = qedfs("resize", tmp_path / "disk.qed", *words, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert text in done.stderr


def test_over_a_larger_backing_it_does_not_grow_whether_that_is_known_or_asked(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "disk", 2 * MIB)
    qedfs("create", tmp_path / "disk.qed", "--backing", raw, "--size", "1M", "--shrink", "--quiet")
    done = qedfs("resize", tmp_path / "disk.qed", "4M", "--allow-backing", tmp_path, check=False)
    assert done.returncode == 2
    assert "its backing has 2097152 bytes, and the image 1048576" in done.stderr
    qedfs("create", tmp_path / "standby.qed", "--backing", raw, "--standby", "--quiet")
    done = qedfs("resize", tmp_path / "standby.qed", "4M", check=False)
    assert "is in standby" in done.stderr
