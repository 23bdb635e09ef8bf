"""A mount lives within the memory that its control group allows, however much there is to bring in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qedfs.host.cgroup import memory_limit
from tests.harness.cgroup import inside, limited
from tests.harness.images import random_image
from tests.harness.mounts import mounted
from tests.harness.servers import nginx
from tests.overlay.images import empty

from .support import MIB, assert_whole, create

LIMIT = 100 * MIB
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": 100 * MIB}, 100 * MIB),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 90 * MIB}, 90 * MIB),
        ("0::/a/b\n", {"a/b/memory.max": 100 * MIB, "a/memory.high": 80 * MIB}, 80 * MIB),
        ("0::/a:b/c d\n", {"a:b/c d/memory.max": 70 * MIB}, 70 * MIB),
        ("0::/\n", {"memory.max": 60 * MIB}, 60 * MIB),  # a container with a namespace of its own
        ("0::/../x\n", {"memory.max": 60 * MIB}, 60 * MIB),
        ("0::/system.slice/docker-1.scope\n", {"memory.max": 60 * MIB}, 60 * MIB),  # and one without
        ("0::/a\n", {"unified/a/memory.max": 50 * MIB}, 50 * MIB),
        ("1:cpu:/\n4:memory:/m/n\n0::/\n", {"memory/m/n/memory.limit_in_bytes": 40 * MIB}, 40 * MIB),
        ("4:cpu,memory:/m/n\n", {"memory/m/memory.limit_in_bytes": 30 * MIB}, 30 * MIB),
        ("4:memory:/m\n", {"memory/m/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000}, MACHINE),
        ("0::/a\n", {"a/memory.max": "max"}, MACHINE),
        ("0::/a\n", {"a/memory.max": "garbage"}, MACHINE),
        ("4:cpu:/m\n", {"memory/m/memory.limit_in_bytes": 1}, MACHINE),
        ("garbage", {}, MACHINE),
        ("", {}, MACHINE),
    ],
)
def test_the_limit_is_the_least_of_all_groups_above(
    tmp_path: Path, groups: str, files: dict[str, object], expected: int
) -> None:
    (tmp_path / "proc").write_text(groups)
    for name, value in files.items():
        put(tmp_path / "sys" / name, value)
    assert memory_limit(tmp_path / "proc", tmp_path / "sys") == expected


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "proc", tmp_path / "sys") == MACHINE


def test_a_mount_streams_many_sources_in_a_hundred_mebibytes(tmp_path: Path) -> None:
    www, overlays = tmp_path / "www", tmp_path / "overlays"
    www.mkdir()
    overlays.mkdir()
    names = [f"{number:02}" for number in range(24)]
    with nginx(www) as server, limited(LIMIT) as group:
        for number, name in enumerate(names):
            random_image(www / name, 5 * MIB, seed=number)  # 120 MiB of them
            create(overlays / f"{name}.qed", f"{server.url}/{name}")
        claim = empty(cluster_size=MIB, table_size=16, image_size=1 << 62, backing=f"{server.url}/00".encode())
        for name in names[:8]:
            with (overlays / f"claim-{name}.qed").open("wb") as file:
                file.write(claim.data[:4096])
                file.truncate(len(claim.data))
        through = inside(group)
        with mounted(overlays, tmp_path / "mnt", through=through) as mount:
            mount.wait()
            assert mount.unmount() == 0
    for name in names:
        assert_whole(overlays / f"{name}.qed", www / name)


def test_clusters_that_memory_has_no_room_for_are_refused_in_plain_words(tmp_path: Path) -> None:
    create(tmp_path / "large.qed", "http://127.0.0.1:9/x", "--offline", "--size", "1G", "--cluster-size", "16M")
    with limited(LIMIT) as group:
        through = inside(group)
        with mounted(tmp_path, tmp_path / "mnt", "--no-stream", through=through) as mount:
            (image,) = mount.status()["images"]
            assert not image["served"]
            assert "clusters of 16.0 MiB are too large for the memory that this mount may use" in image["error"]
