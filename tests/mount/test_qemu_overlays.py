"""Overlays go back and forth between QEMU and qedfs: what one has half filled, the other reads right."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.harness.images import qemu_check, qemu_create, qemu_info, qemu_io, qemu_same, random_image, sparse_image
from tests.harness.mounts import mounted
from tests.harness.require import require

from .support import MIB, Writer, assert_same, assert_whole, create, mounted_over, opened, origin

# QEMU itself damages overlays with tables of 8 and 16 clusters, opens none with 1, and makes none of larger clusters.
GEOMETRIES = [
    *[("4k", 2), ("64k", 4), ("2M", 4)],
    *[pytest.param(*more, marks=pytest.mark.slow) for more in (("4k", 4), ("64k", 2), ("1M", 4), ("4M", 2))],
]
SIZE = 6 * MIB + 512  # ends inside a cluster of every size


def half_fill_with_qemu(overlay: Path, seed: int) -> bytes:
    """Writes patterns and zeros of many alignments with qemu-io; returns the image as QEMU reads it then.

    What it should read is not ours to say: a write by QEMU to a part of a zero cluster brings the backing's bytes back.
    """
    source = random.Random(seed)
    commands = []
    for _ in range(25):
        length = 512 * source.choice((1, 7, 8, 128, 131, 700))
        pos = 512 * source.randrange((SIZE - length) // 512)
        how = "-z" if source.random() < 0.25 else f"-P {source.randrange(1, 256)}"
        commands.append(f"write {how} {pos} {length}")
    qemu_io(overlay, *commands)
    flat = overlay.with_suffix(".flat")
    subprocess.run([require("qemu-img"), "convert", "-f", "qed", "-O", "raw", overlay, flat], check=True)
    return flat.read_bytes()


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
def test_back_and_forth(tmp_path: Path, cluster_size: str, table_size: int) -> None:
    """QEMU makes and half fills it, qedfs serves and fills on, QEMU reads and writes, qedfs finishes."""
    raw = random_image(tmp_path / "raw", SIZE)
    model = tmp_path / "model"
    overlay = qemu_create(tmp_path / "disk.qed", raw, cluster_size=cluster_size, table_size=str(table_size))
    expected = bytearray(half_fill_with_qemu(overlay, 1))
    options = ("--allow-backing", str(raw))
    with mounted(overlay, tmp_path / "mnt", "--no-stream", *options) as mount:
        image = mount.path("disk.raw")
        assert image.read_bytes()[: 2 * MIB] == expected[: 2 * MIB]
        writer = Writer(SIZE, seed=2)
        with opened(image) as fd:
            for _ in range(20):
                pos, data = writer.next()
                os.pwrite(fd, data, pos)
                expected[pos : pos + len(data)] = data
        model.write_bytes(expected)
        assert_same(image, model)
        assert mount.unmount() == 0
    assert qemu_check(overlay) == (0, 0)
    assert qemu_same(overlay, model)
    assert qemu_info(overlay)["backing-filename"] == str(raw)
    model.write_bytes(half_fill_with_qemu(overlay, 3))
    with mounted(overlay, tmp_path / "mnt", *options) as mount:
        assert_same(mount.path("disk.raw"), model)
        mount.wait()
        assert_same(mount.path("disk.raw"), model)
        assert mount.unmount() == 0
    raw.unlink()
    assert_whole(overlay, model)


@pytest.mark.parametrize("cluster_size", ["4K", "2M"])
def test_qemu_reads_what_qedfs_has_half_filled(tmp_path: Path, cluster_size: str) -> None:
    """Over HTTP, so that QEMU's own client reads the rest."""
    with origin(tmp_path, SIZE) as source:
        create(tmp_path / "disk.qed", source.url, "--cluster-size", cluster_size)
        expected = bytearray(source.data())
        with mounted_over(tmp_path, source.url, "--no-stream") as mount, opened(mount.path("disk.raw")) as fd:
            writer = Writer(SIZE, seed=4)
            for _ in range(20):
                pos, data = writer.next()
                os.pwrite(fd, data, pos)
                expected[pos : pos + len(data)] = data
                os.pread(fd, 100_000, (pos * 7) % SIZE)
        model = tmp_path / "model"
        model.write_bytes(expected)
        overlay = tmp_path / "disk.qed"
        assert qemu_check(overlay) == (0, 0)
        assert qemu_same(overlay, model)
        qemu_io(overlay, "write -P 1 0 64k")
        expected[: 64 << 10] = b"\1" * (64 << 10)
        model.write_bytes(expected)
        with mounted_over(tmp_path, source.url) as mount:
            mount.wait()
            assert mount.unmount() == 0
        assert_whole(overlay, model)


def test_an_overlay_that_qemu_left_dirty_is_repaired(tmp_path: Path) -> None:
    """QEMU sets "needs check" while it allocates, if there is no backing; killed there, it leaves it set."""
    overlay = qemu_create(tmp_path / "disk.qed", size=SIZE, cluster_size="64k")
    with pytest.raises(RuntimeError):
        qemu_io(overlay, "write -P 5 64k 64k", "flush", "abort")
    assert _needs_check(overlay)
    model = sparse_image(tmp_path / "model", SIZE, {64 << 10: b"\5" * (64 << 10)})
    with mounted(overlay, tmp_path / "mnt") as mount:
        assert_same(mount.path("disk.raw"), model)
        assert mount.unmount() == 0
    assert not _needs_check(overlay)
    assert_whole(overlay, model)


def _needs_check(overlay: Path) -> bool:
    # The second of the feature bits (docs/interop/qed_spec.rst); qemu-img info shows it cleared.
    return bool(overlay.read_bytes()[16] & 2)


def test_a_rebase_by_qemu_is_respected(tmp_path: Path) -> None:
    """The backing is another file afterwards: the version that was stored with the overlay is not held against it."""
    raw = random_image(tmp_path / "raw", SIZE)
    overlay = qemu_create(tmp_path / "disk.qed", raw)
    with mounted(overlay, tmp_path / "mnt", "--no-stream", "--allow-backing", raw) as mount:
        assert mount.path("disk.raw").read_bytes()[:MIB] == raw.read_bytes()[:MIB]
        assert mount.unmount() == 0
    moved = raw.rename(tmp_path / "moved")
    subprocess.run([require("qemu-img"), "rebase", "-u", "-f", "qed", "-b", moved, "-F", "raw", overlay], check=True)
    with mounted(overlay, tmp_path / "mnt", "--allow-backing", moved) as mount:
        assert_same(mount.path("disk.raw"), moved)
        mount.wait()
        assert mount.unmount() == 0
    assert_whole(overlay, moved)
