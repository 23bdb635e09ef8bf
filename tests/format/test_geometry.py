"""The numbers that follow from cluster, table and image size, and which sizes QEMU would not open."""

from __future__ import annotations

import pytest

from qedfs.format.geometry import MAX_CLUSTER_SIZE, MIN_CLUSTER_SIZE, Geometry, round_down, round_up

KiB, MiB, GiB, TiB = (1 << shift for shift in (10, 20, 30, 40))


def test_the_default_sizes_of_qemu() -> None:
    geometry = Geometry(64 * KiB, 4, 10 * GiB + 512)
    assert (geometry.table_bytes, geometry.entries, geometry.l2_span) == (256 * KiB, 32768, 2 * GiB)
    assert (geometry.clusters, geometry.l1_used) == (10 * GiB // (64 * KiB) + 1, 6)
    assert geometry.max_image_size == 64 * TiB
    assert geometry.fault() is None


@pytest.mark.parametrize(
    ("cluster_size", "table_size", "image_size", "complaint"),
    [
        (MIN_CLUSTER_SIZE, 1, 0, None),
        (MAX_CLUSTER_SIZE, 16, 512, None),
        (MIN_CLUSTER_SIZE // 2, 1, 0, "cluster size"),
        (MAX_CLUSTER_SIZE * 2, 1, 0, "cluster size"),
        (3 * 4 * KiB, 1, 0, "cluster size"),
        (0, 1, 0, "cluster size"),
        (64 * KiB, 0, 0, "table size"),
        (64 * KiB, 3, 0, "table size"),
        (64 * KiB, 32, 0, "table size"),
        (64 * KiB, 4, 511, "not a multiple of 512"),
        (4 * KiB, 1, 512 * 512 * 4 * KiB, None),
        (4 * KiB, 1, 512 * 512 * 4 * KiB + 512, "more than the tables"),
        (MAX_CLUSTER_SIZE, 16, 1 << 63, "more than the tables"),
    ],
)
def test_what_qemu_would_not_open(cluster_size: int, table_size: int, image_size: int, complaint: str | None) -> None:
    fault = Geometry(cluster_size, table_size, image_size).fault()
    assert (fault is None) == (complaint is None)
    assert complaint is None or complaint in (fault or "")


def test_rounding() -> None:
    for value in range(20):
        assert round_down(value, 8) == max(n for n in range(0, 24, 8) if n <= value)
        assert round_up(value, 8) == min(n for n in range(0, 32, 8) if n >= value)
