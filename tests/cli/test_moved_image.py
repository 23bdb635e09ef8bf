"""The image that a moved disk becomes, on a real mount: which images can become one, and the wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qedfs.cli.migration.moved_image import MovedImage
from qedfs.control.qmp.client import Client
from qedfs.errors import SourceError, UsageError
from tests.harness.images import random_image
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.servers import nginx, qemu_nbd

SIZE = 1 << 20


@contextlib.contextmanager
def standby(folder: Path, *urls: str) -> Iterator[Mount]:
    """A mount of images in standby: disk0.raw, disk1.raw ..."""
    (folder / "overlays").mkdir()
    for number, url in enumerate(urls):
        known = ("--offline", "--size", str(SIZE), "--backing-format", "raw", "--standby")
        qedfs("create", folder / f"overlays/disk{number}.qed", "--backing", url, *known)
    local = () if any(url.startswith("http") for url in urls) else ("--allow-backing", "/")
    with mounted(folder / "overlays", folder / "mnt", *local) as mount:
        yield mount


def image(mount: Mount, name: str | None = None) -> MovedImage:
    return MovedImage(lambda: Client.connect(str(mount.mountpoint)), name)


def test_an_image_is_cut_over_once_its_source_is_there_and_becomes_complete(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "disk", SIZE)
    socket = tmp_path / "nbd"
    with standby(tmp_path, f"nbd+unix:///?socket={socket}") as mount, contextlib.closing(image(mount)) as moved:
        assert (str(moved), moved.size) == ("disk0.raw", SIZE)
        with pytest.raises(SourceError):
            moved.check_ready()
        with pytest.raises(SourceError):
            moved.cut_over()
        with qemu_nbd(raw) as server:
            assert isinstance(server.address, Path)
            socket.symlink_to(server.address)
            moved.check_ready()
            assert mount.image()["state"] == "standby"
            moved.cut_over()
            shown: list[str] = []
            moved.wait_complete(lambda images: shown.append(images[0]["name"]), print)
            assert set(shown) == {"disk0.raw"}
        assert mount.path("disk0.raw").read_bytes() == raw.read_bytes()
        with pytest.raises(UsageError, match=r"disk0.raw: is not in standby, but complete"):
            image(mount)


def test_one_of_several_images_is_named(tmp_path: Path) -> None:
    with standby(tmp_path, "nbd+unix:///?socket=/none", "nbd+unix:///?socket=/none") as mount:
        with pytest.raises(UsageError, match="has 2 images; say which one the disk becomes"):
            image(mount)
        moved = image(mount, "disk1")
        assert str(moved) == "disk1.raw"
        moved.close()


def test_a_source_that_is_no_nbd_server(tmp_path: Path) -> None:
    www = tmp_path / "www"
    www.mkdir()
    random_image(www / "disk", SIZE)
    with (
        nginx(www) as server,
        standby(tmp_path, f"{server.url}/disk") as mount,
        pytest.raises(UsageError, match="a running machine's disk is served over NBD"),
    ):
        image(mount)


def test_a_mount_that_ends_while_one_waits_is_waited_for(tmp_path: Path) -> None:
    raw = random_image(tmp_path / "disk", SIZE)
    with qemu_nbd(raw) as server:
        with standby(tmp_path, server.url) as mount:
            moved = image(mount)
            qedfs("stream", "pause", mount.mountpoint)
            moved.cut_over()
            mount.kill()
        said: list[str] = []

        def mount_again(text: str) -> None:
            said.append(text)
            again = mounted(tmp_path / "overlays", tmp_path / "mnt", "--allow-backing", "/")
            stack.enter_context(again)
            qedfs("stream", "resume", tmp_path / "mnt")

        with contextlib.ExitStack() as stack, contextlib.closing(moved):
            moved.wait_complete(lambda _: None, mount_again)
        assert len(said) == 1
        assert "the disk is served on until it is mounted again" in said[0]
