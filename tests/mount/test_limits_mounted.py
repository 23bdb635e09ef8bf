"""`--limit` and `--limit-total` on real mounts: bytes kept and fetched against what the limiters have let through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.images import random_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.servers import nbdkit, nginx
from tests.mount.support import MIB, create

PIECE = 256 << 10  # a quarter of a second at 1 MiB/s


@contextlib.contextmanager
def overlays(folder: Path, kind: str, *, bases: int, count: int) -> Iterator[Path]:
    """A folder of `count` overlays over `bases` images, which nginx or nbdkit serves."""
    (vms := folder / "vms").mkdir()
    (www := folder / "www").mkdir()
    files = [random_image(www / f"base{number}", 24 * MIB, seed=number) for number in range(bases)]
    with contextlib.ExitStack() as stack:
        if kind == "nginx":
            server = stack.enter_context(nginx(www))
            urls = [f"{server.url}/{file.name}" for file in files]
        else:
            urls = [stack.enter_context(nbdkit("file", file, tcp=True)).url for file in files]
        for number in range(count):
            create(vms / f"disk{number}.qed", urls[number % bases])
        yield vms


def when(mount: Mount, kept: int) -> dict[str, Any]:
    """The status when each image has kept this much."""
    wait_for(lambda: all(each["counters"]["kept_stream"] >= kept for each in mount.status()["images"]), "the streams")
    return mount.status()


def fetched(status: dict[str, Any]) -> int:
    return sum(source["fetched"] for source in status["sources"])


@pytest.mark.parametrize("kind", ["nginx", "nbdkit"])
def test_overlays_of_one_base_advance_in_step(tmp_path: Path, kind: str) -> None:
    with (
        overlays(tmp_path, kind, bases=1, count=4) as vms,
        mounted(vms, tmp_path / "mnt", "--limit", "1M", "--metrics", f"unix:{tmp_path}/metrics") as mount,
    ):
        status = when(mount, 3 * MIB)
        granted = [image["granted"] for image in status["images"]]
        for image in status["images"]:
            assert image["counters"]["kept_stream"] <= image["granted"]
            assert not image["counters"]["kept_asked"]
        # Each has been granted what was fetched once for all of them, but for pieces before the last one was opened.
        assert max(granted) - min(granted) <= 2 * PIECE
        assert fetched(status) <= status["fetched_in_background"] <= max(granted) + 3 * PIECE
        # A reader is not counted against the limit of its own image.
        with mount.path("disk0.raw").open("rb") as file:
            file.seek(16 * MIB)
            file.read(4 * MIB)
        image = mount.image("disk0.raw")
        assert image["counters"]["kept_asked"] >= 4 * MIB - PIECE
        assert image["counters"]["kept_stream"] <= image["granted"]


def test_overlays_of_several_bases_share_the_limit_of_the_mount(tmp_path: Path) -> None:
    with (
        overlays(tmp_path, "nginx", bases=4, count=4) as vms,
        mounted(vms, tmp_path / "mnt", "-o", "limit_total=4M") as mount,
    ):
        status = when(mount, 3 * MIB)
        assert status["limit_total"] == 4 * MIB
        kept = [image["counters"]["kept_stream"] for image in status["images"]]
        # A piece is 1 MiB: no image is more than two of them ahead of another one.
        assert max(kept) - min(kept) <= 2 * MIB
        assert sum(kept) <= fetched(status) <= status["fetched_in_background"]
        assert "at most 4.00 MiB/s for all streams together" in qedfs("status", mount.mountpoint).stdout
        qedfs("stream", "limit", "--total", mount.mountpoint, "1K")
        assert mount.status()["limit_total"] == 1024
        # All wait for it now, for a minute or more, and unmounting does not.
        assert mount.unmount() == 0


def test_the_limit_of_the_mount_is_lifted_while_all_wait_for_it(tmp_path: Path) -> None:
    with (
        overlays(tmp_path, "nginx", bases=2, count=3) as vms,
        mounted(vms, tmp_path / "mnt", "--limit-total", "1K") as mount,
    ):
        wait_for(lambda: mount.status()["fetched_in_background"] > 0, "the first request")
        found = qedfs("stream", "limit", "--total", "--json", mount.mountpoint, "0")
        assert '"disk2.raw"' in found.stdout
        mount.wait()
        status = mount.status()
        # Each base once. At the first moment two siblings that lack different parts may ask for the same cluster.
        assert 2 * 24 * MIB <= fetched(status) <= 1.01 * 2 * 24 * MIB
        assert "at most" not in qedfs("status", mount.mountpoint).stdout
        done = qedfs("stream", "limit", "--total", mount.mountpoint, "disk0", "1M", check=False)
        assert done.returncode == 2
