"""The main job: create, mount, read while it streams, wait, unmount; then the overlay stands alone."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.images import first_difference, random_image, sparse_image
from tests.harness.process import wait_for
from tests.harness.servers import Nginx, Server, nbdkit, nginx, qemu_nbd

from .support import MIB, assert_whole, create, mounted_over

SERVERS = ("nginx", "qemu-nbd", "nbdkit")


@contextlib.contextmanager
def serving(kind: str, raw: Path) -> Iterator[tuple[Server, str]]:
    """A server of one raw file and the URL of it."""
    if kind == "nginx":
        with nginx(raw.parent) as server:
            yield server, f"{server.url}/{raw.name}"
    elif kind == "qemu-nbd":
        with qemu_nbd(raw, tcp=True) as server:
            yield server, server.url
    else:
        with nbdkit("file", raw, tcp=True) as server:
            yield server, server.url


def overlapping_bytes(server: Nginx) -> int:
    """Bytes that nginx was asked for more than once."""
    asked = [range_.removeprefix("bytes=").split("-") for range_ in server.ranges()]
    spans = sorted((int(first), int(last) + 1) for first, last in asked)
    twice = end = 0
    for start, stop in spans:
        twice += max(0, min(end, stop) - start)
        end = max(end, stop)
    return twice


def do_the_job(folder: Path, kind: str, size: int) -> None:
    """The whole of it, for an image of random bytes."""
    raw = random_image(folder / "disk", size)
    overlay = folder / "disk.qed"
    with serving(kind, raw) as (server, url):
        with mounted_over(folder, url) as mount:
            assert first_difference(mount.path("disk.raw"), raw) is None
            mount.wait()
            status = mount.image()
            assert (status["state"], status["populated"], status["backing"]) == ("complete", size, None)
            server.kill()
            assert first_difference(mount.path("disk.raw"), raw) is None
            assert mount.unmount() == 0
        if isinstance(server, Nginx):
            assert server.body_bytes() <= 1.02 * size
            # A client looks at the first bytes to learn the version; nothing else is asked for twice.
            assert overlapping_bytes(server) < 4096
    assert_whole(overlay, raw)


@pytest.mark.parametrize("kind", SERVERS)
def test_equal_while_it_streams_and_whole_without_the_server(tmp_path: Path, kind: str) -> None:
    do_the_job(tmp_path, kind, 64 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
def test_a_gibibyte(tmp_path: Path, kind: str) -> None:
    do_the_job(tmp_path, kind, 1 << 30)


def test_a_stream_that_was_cut_goes_on_and_fetches_nothing_twice(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "disk", 32 * MIB)
    with nginx(tmp_path) as server:
        url = f"{server.url}/disk"
        populated = 0
        for _ in range(3):
            # Slow enough that the image is far from complete, however long the unmount takes.
            with mounted_over(tmp_path, url, "--limit", "1M") as mount:
                least = populated + MIB
                wait_for(lambda: mount.image()["populated"] >= least, "more of the image")  # noqa: B023 - called at once
                populated = mount.image()["populated"]
                assert mount.image()["state"] == "running"
                assert mount.unmount() == 0
        with mounted_over(tmp_path, url) as mount:
            assert mount.image()["populated"] >= populated
            mount.wait()
            assert mount.unmount() == 0
        # A request that was under way when the mount ended is the only thing that may be asked for again.
        assert server.body_bytes() <= 1.02 * raw.stat().st_size + 4 * MIB
    assert_whole(tmp_path / "disk.qed", raw)


def sparse_job(folder: Path, size: int, data_size: int) -> None:
    """An image of which most is a hole: neither the wire nor the disk carries more than its data, by a fifteenth."""
    source = random.Random(1)
    pieces = 30
    step = size // pieces
    # Pieces that start and end inside clusters, one at the very end.
    parts = {
        number * step + 4096 * source.randrange(step // 8192): source.randbytes(data_size // pieces)
        for number in range(pieces - 1)
    }
    parts[size - data_size // pieces] = source.randbytes(data_size // pieces)
    raw = sparse_image(folder / "disk", size, parts)
    with nbdkit("file", raw, "statsfile=" + str(folder / "stats"), filters=["stats"], tcp=True) as server:
        with mounted_over(folder, server.url) as mount:
            mount.wait()
            assert mount.image()["state"] == "complete"
            fetched = mount.status()["sources"][0]["fetched"]
            assert mount.unmount() == 0
        server.stop()
        assert data_size <= fetched <= data_size * 16 // 15
        assert read_by_clients(folder / "stats") <= data_size * 16 // 15
    overlay = folder / "disk.qed"
    assert overlay.stat().st_blocks * 512 <= data_size * 16 // 15
    assert_whole(overlay, raw)


def read_by_clients(statistics: Path) -> int:
    """Bytes that nbdkit's stats filter says were read."""
    (line,) = [line for line in statistics.read_text().splitlines() if line.startswith("read:")]
    found = re.search(r"([0-9.]+) (bytes|[KMG]iB)", line)
    assert found, line
    return int(float(found[1]) * {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[found[2]])


def test_holes_cross_no_wire_and_take_no_disk(tmp_path: Path) -> None:
    sparse_job(tmp_path, 512 * MIB, 40 * MIB)


@pytest.mark.slow
def test_four_gibibytes_of_which_300_mebibytes_are_data(tmp_path: Path) -> None:
    sparse_job(tmp_path, 4 << 30, 300 * MIB)


def test_zeros_of_a_web_server_take_no_disk(tmp_path: Path) -> None:
    raw = sparse_image(tmp_path / "disk", 64 * MIB, {5 * MIB: os.urandom(2 * MIB)})
    with nginx(tmp_path) as server, mounted_over(tmp_path, f"{server.url}/disk") as mount:
        mount.wait()
        assert mount.unmount() == 0
    assert (tmp_path / "disk.qed").stat().st_blocks * 512 < 3 * MIB
    assert_whole(tmp_path / "disk.qed", raw)


@pytest.mark.parametrize(("image_size", "source_size"), [(8 * MIB, 3 * MIB + 512), (3 * MIB + 512, 8 * MIB)])
def test_an_image_longer_or_shorter_than_its_source(tmp_path: Path, image_size: int, source_size: int) -> None:
    raw = random_image(tmp_path / "disk", source_size)
    expected = (raw.read_bytes() + bytes(image_size))[:image_size]
    with nginx(tmp_path) as server:
        create(tmp_path / "disk.qed", f"{server.url}/disk", "--shrink", "--size", str(image_size))
        with mounted_over(tmp_path, f"{server.url}/disk") as mount:
            assert mount.path("disk.raw").read_bytes() == expected
            mount.wait()
            assert mount.path("disk.raw").read_bytes() == expected
            assert mount.unmount() == 0
    raw.write_bytes(expected)
    assert_whole(tmp_path / "disk.qed", raw)
