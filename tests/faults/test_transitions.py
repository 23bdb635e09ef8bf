"""A real server that begins to tell of its file in another way, in the middle of a mount and between two of them.

The file stays the same, or is replaced by another one of the same size: then not a byte of it may reach the image.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qedfs.overlay.create import create_overlay
from tests.harness.images import random_image
from tests.harness.mounts import Mount, mounted
from tests.harness.servers import nbdkit, nginx, qemu_nbd
from tests.mount.support import CLUSTER_SIZE, MIB, read_direct

SIZE = 4 * MIB
TIMEOUT = ("--source-timeout", "5s", "--no-stream")
# Directives for each way of telling; nginx answers 412 to each If-Match where it has no ETag of its own.
TELLS = {
    "strong, date": "",
    "date": "etag off;",
    "none": "etag off; add_header Last-Modified '';",
    "weak": "etag off; add_header Last-Modified ''; add_header ETag 'W/\"a\"';",
    "other weak": "etag off; add_header Last-Modified ''; add_header ETag 'W/\"b\"';",
}


class Telling:
    """nginx, whose tale is the name of a file beside the image."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.old, self.new = folder / "old", folder / "new"
        self._folder = folder
        self._tale = ""

    def tell(self, kind: str) -> None:
        (self._folder / f"tell-{self._tale}").unlink(missing_ok=True)
        self._tale = kind.replace(", ", "-").replace(" ", "-")
        (self._folder / f"tell-{self._tale}").touch()

    def serve(self, version: Path) -> None:
        (self._folder / "next").unlink(missing_ok=True)
        os.link(version, self._folder / "next")
        (self._folder / "next").replace(self._folder / "disk")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Telling]:
    folder = tmp_path / "served"
    folder.mkdir()
    for name, seed in (("old", 1), ("new", 2)):
        random_image(folder / name, SIZE, seed=seed)
        os.utime(folder / name, (10**9, 10**9))  # as after `cp -p`
    names = {kind: kind.replace(", ", "-").replace(" ", "-") for kind in TELLS}
    location = "\n".join(
        f"if (-f $document_root/tell-{name}) {{ rewrite ^ /{name}/disk last; }}" for name in names.values()
    )
    places = "\n".join(
        f"location /{names[kind]}/ {{ internal; alias {folder}/; {directives} }}" for kind, directives in TELLS.items()
    )
    with nginx(folder, location=location, server=places) as running:
        telling = Telling(folder, f"{running.url}/disk")
        telling.serve(telling.old)
        yield telling


def new_overlay(path: Path, url: str) -> Path:
    create_overlay(str(path), image_size=SIZE, backing=url)
    return path


def read_some(mount: Mount, content: bytes) -> None:
    for pos in (0, MIB):
        assert read_direct(mount.path("disk.raw"), pos, CLUSTER_SIZE) == content[pos : pos + CLUSTER_SIZE]


def assert_refused(mount: Mount, local: bytes) -> None:
    for pos in (2 * MIB, 3 * MIB):
        with pytest.raises(OSError, match="Input/output"):
            read_direct(mount.path("disk.raw"), pos, CLUSTER_SIZE)
    read_some(mount, local)


def slow(*pair: str) -> Any:
    return pytest.param(*pair, marks=pytest.mark.slow)


# The others have their tests without a mount.
TRANSITIONS = [
    ("strong, date", "none"),
    slow("strong, date", "date"),
    ("strong, date", "weak"),
    slow("date", "none"),
    slow("date", "weak"),
    slow("weak", "none"),
    slow("weak", "date"),
    slow("none", "weak"),
    slow("none", "date"),
    slow("none", "strong, date"),
]


@pytest.mark.parametrize(("pinned", "shown"), TRANSITIONS)
def test_the_same_file_told_of_in_another_way(server: Telling, tmp_path: Path, pinned: str, shown: str) -> None:
    content = server.old.read_bytes()
    overlay = new_overlay(tmp_path / "disk.qed", server.url)
    server.tell(pinned)
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        read_some(mount, content)
        server.tell(shown)
        assert read_direct(mount.path("disk.raw"), 2 * MIB, CLUSTER_SIZE) == content[2 * MIB : 2 * MIB + CLUSTER_SIZE]
        assert mount.unmount() == 0
    server.tell(pinned)
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        server.tell(shown)
        assert read_direct(mount.path("disk.raw"), 3 * MIB, CLUSTER_SIZE) == content[3 * MIB : 3 * MIB + CLUSTER_SIZE]
        assert mount.unmount() == 0


@pytest.mark.parametrize(
    ("pinned", "shown"), [*TRANSITIONS, ("weak", "other weak"), ("none", "none"), slow("weak", "weak")]
)
def test_another_file_of_the_same_size_and_date(server: Telling, tmp_path: Path, pinned: str, shown: str) -> None:
    content = server.old.read_bytes()
    overlay = new_overlay(tmp_path / "disk.qed", server.url)
    server.tell(pinned)
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        read_some(mount, content)
        if pinned != shown:  # otherwise nothing can tell, until the next connection
            server.serve(server.new)
            server.tell(shown)
            assert_refused(mount, content)
        assert mount.unmount() == 0
    server.serve(server.new)
    server.tell(shown)
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        assert_refused(mount, content)
        assert mount.unmount() == 0
    # And back.
    server.serve(server.old)
    server.tell(pinned)
    with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
        assert read_direct(mount.path("disk.raw"), 2 * MIB, CLUSTER_SIZE) == content[2 * MIB : 2 * MIB + CLUSTER_SIZE]
        assert mount.unmount() == 0


# NBD tells a size, and some servers a description.


@contextlib.contextmanager
def by_nbd(folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """nbdkit with a file; what is returned starts it again with another one."""
    for name, seed in (("old", 1), ("new", 2)):
        random_image(folder / name, SIZE, seed=seed)
    os.link(folder / "old", folder / "disk")
    with nbdkit("file", folder / "disk", tcp=True) as running:

        def serve(version: Path) -> None:
            # An orderly stop would wait for its clients to leave.
            running.kill()
            (folder / "disk").unlink()
            os.link(version, folder / "disk")
            running.restart()

        yield running.url, serve


def test_another_export_of_the_same_size(tmp_path: Path) -> None:
    with by_nbd(tmp_path) as (url, serve):
        content = (tmp_path / "old").read_bytes()
        overlay = new_overlay(tmp_path / "disk.qed", url)
        with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
            read_some(mount, content)
            serve(tmp_path / "old")  # the same, on a new connection
            pos = 2 * MIB + CLUSTER_SIZE
            assert read_direct(mount.path("disk.raw"), pos, CLUSTER_SIZE) == content[pos : pos + CLUSTER_SIZE]
            serve(tmp_path / "new")
            assert_refused(mount, content)
            assert mount.unmount() == 0
        with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
            assert_refused(mount, content)
            assert "the bytes at 0 differ" in mount.output()
            assert mount.unmount() == 0
        serve(tmp_path / "old")
        with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
            assert (
                read_direct(mount.path("disk.raw"), 2 * MIB, CLUSTER_SIZE) == content[2 * MIB : 2 * MIB + CLUSTER_SIZE]
            )
            assert mount.unmount() == 0


def test_the_description_of_an_export(tmp_path: Path) -> None:
    """What differs elsewhere than in the sampled blocks: a server that describes its versions tells it all the same."""
    content = random_image(tmp_path / "one", SIZE, seed=1).read_bytes()
    with qemu_nbd(tmp_path / "one", tcp=True) as running:
        plain = list(running.argv)
        running.argv = [*plain[:-1], "-D", "build 1", plain[-1]]
        running.restart()
        overlay = new_overlay(tmp_path / "disk.qed", running.url)
        with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
            read_some(mount, content)
            assert mount.unmount() == 0
        with (tmp_path / "one").open("r+b") as file:
            file.seek(3 * MIB)
            file.write(b"other")
        running.argv = [*plain[:-1], "-D", "build 2", plain[-1]]
        running.restart()
        with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
            assert_refused(mount, content)
            assert 'was W/description "build 1", is now W/description "build 2"' in mount.output()
            assert mount.unmount() == 0


# What the user may say.


def test_servers_behind_one_name_whose_tags_differ(tmp_path: Path) -> None:
    """The same bytes under a tag for each server, and no condition that all of them meet."""
    folder = tmp_path / "served"
    folder.mkdir()
    raw = random_image(folder / "disk", SIZE, seed=1)
    content = raw.read_bytes()
    # A split by the range that is asked for: as good as a balancer's, and the same each time.
    split = 'map $http_range $node { default a; "~bytes=[0-9]*[13579]-" b; "~bytes=1.*" b; "~bytes=3.*" b; }'
    with nginx(folder, http=split, location="etag off; add_header ETag '\"$node\"';") as running:
        overlay = new_overlay(tmp_path / "disk.qed", f"{running.url}/disk")
        with mounted(overlay, tmp_path / "mnt", *TIMEOUT) as mount:
            with pytest.raises(OSError, match="Input/output"):
                mount.path("disk.raw").read_bytes()
            assert mount.unmount() == 0
        for pin in ("date", "size", "none"):
            with mounted(overlay, tmp_path / "mnt", *TIMEOUT, "--pin", pin) as mount:
                assert mount.path("disk.raw").read_bytes() == content
                assert mount.unmount() == 0
            overlay.unlink()
            new_overlay(overlay, f"{running.url}/disk")
