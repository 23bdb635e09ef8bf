"""A folder of overlays: what can be served is, what cannot is named with its reason, and overlays come and go."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.images import qemu_create, qemu_io, qemu_same
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import free_port, wait_for

from .support import MIB, Origin, assert_same, assert_whole, create, opened, origin

SIZE = 16 * MIB


@contextlib.contextmanager
def folder_of(folder: Path, *options: str) -> Iterator[tuple[Origin, Path, Mount]]:
    """Three good overlays in a folder that is mounted."""
    overlays = folder / "overlays"
    overlays.mkdir()
    with origin(folder, SIZE) as source:
        for name in "abc":
            create(overlays / f"{name}.qed", source.url)
        with mounted(overlays, folder / "mnt", *options) as mount:
            yield source, overlays, mount


def test_the_good_are_served_and_the_bad_are_named(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with origin(tmp_path, SIZE) as source:
        for name in "abc":
            create(overlays / f"{name}.qed", source.url)
        truncated = overlays / "truncated.qed"
        shutil.copy(overlays / "a.qed", truncated)
        os.truncate(truncated, 1000)
        (overlays / "text.qed").write_text("This is no image.\n" * 1000)
        os.mkfifo(overlays / "fifo.qed")
        (overlays / "link.qed").symlink_to("a.qed")
        (overlays / "folder.qed").mkdir()
        (overlays / "notes.txt").write_text("not asked for")
        create(overlays / "dead.qed", f"http://127.0.0.1:{free_port()}/disk", "--offline", "--size", str(SIZE))
        # Whoever waits for the dead server waits longer than this test may.
        with mounted(overlays, tmp_path / "mnt", "--source-timeout", "1h") as mount:
            assert sorted(os.listdir(mount.mountpoint)) == ["a.raw", "b.raw", "c.raw", "dead.raw"]
            for name in "abc":
                assert_same(mount.path(f"{name}.raw"), source.raw)
            for name in "abc":
                mount.wait(f"{name}.raw")
            images = {image["name"]: image for image in mount.status()["images"]}
            for name in ("truncated", "text", "fifo", "link", "folder"):
                image = images[f"{name}.raw"]
                assert (image["state"], image["exit_code"]) == ("broken", 3)
                assert f"{name}.qed" in image["error"]
                assert image["error"] in mount.output()
            assert "notes.raw" not in images
            assert images["dead.raw"]["state"] in ("running", "waiting")
            assert mount.unmount() == 0
    for name in "abc":
        assert_whole(overlays / f"{name}.qed", source.raw)


def test_what_cannot_be_looked_at_costs_itself_only(tmp_path: Path) -> None:
    """A dead mount in the folder: whoever may make a folder there could otherwise take all images away."""
    overlays = tmp_path / "overlays"
    (overlays / "dead.qed").mkdir(parents=True)
    with origin(tmp_path, MIB) as source:
        create(overlays / "a.qed", source.url)
        with mounted(create(tmp_path / "other.qed", source.url), overlays / "dead.qed", "--no-stream") as dead:
            with mounted(overlays, tmp_path / "before") as mount:
                assert mount.path("a.raw").exists()
                os.kill(dead.pid, signal.SIGKILL)
                wait_for(lambda: not_connected(dead.mountpoint), "a dead mount")  # its attributes stay for a while
                create(overlays / "b.qed", source.url)
                wait_for(mount.path("b.raw").exists, "a new image")
                assert sorted(os.listdir(mount.mountpoint)) == ["a.raw", "b.raw"]
                mount.wait("b")
                assert mount.unmount() == 0
            with mounted(overlays, tmp_path / "behind") as mount:
                assert_same(mount.path("a.raw"), source.raw)
                image = mount.image("dead.raw")
                assert image["state"] == "broken"
                assert image["error"] == f"{dead.mountpoint}: {os.strerror(errno.ENOTCONN)}"
                assert mount.output().count(image["error"]) == 1
                dead.close()
                wait_for(lambda: "not a regular file" in mount.image("dead.raw")["error"], "another look")


def not_connected(place: Path) -> bool:
    """Whether a look at it fails as at a mount whose server has died."""
    try:
        place.lstat()
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def test_each_cluster_crosses_the_wire_once_for_all_overlays_of_a_source(tmp_path: Path) -> None:
    """Streams that begin together: what one has fetched before another image is open, that one fetches again."""
    with folder_of(tmp_path, "--no-stream", "--limit", "8M") as (source, overlays, mount):
        qedfs("stream", "start", mount.mountpoint)
        mount.wait()
        assert mount.unmount() == 0
        sent = source.server.body_bytes()
    assert sent <= 1.1 * SIZE
    for name in "abc":
        assert_whole(overlays / f"{name}.qed", source.raw)


def test_an_empty_folder_waits_for_its_first_overlay(tmp_path: Path) -> None:
    (tmp_path / "overlays").mkdir()
    with mounted(tmp_path / "overlays", tmp_path / "mnt") as mount:
        assert os.listdir(mount.mountpoint) == []
        assert mount.status()["images"] == []
        qemu_create(tmp_path / "overlays" / "disk.qed", size=MIB)
        wait_for(mount.path("disk.raw").exists, "a new image")
        assert mount.path("disk.raw").read_bytes() == bytes(MIB)


def test_overlays_come_and_go(tmp_path: Path) -> None:
    with folder_of(tmp_path) as (source, overlays, mount):
        create(overlays / "new.qed", source.url)
        wait_for(lambda: "new.raw" in os.listdir(mount.mountpoint), "the new image")
        assert_same(mount.path("new.raw"), source.raw)
        (overlays / "b.qed").unlink()
        wait_for(lambda: "b.raw" not in os.listdir(mount.mountpoint), "end of an image")
        with pytest.raises(FileNotFoundError):
            mount.path("b.raw").stat()
        assert [image["name"] for image in mount.status()["images"]] == ["a.raw", "c.raw", "new.raw"]
        assert_same(mount.path("a.raw"), source.raw)
        mount.wait()


def test_who_has_an_image_open_keeps_it_when_its_overlay_goes(tmp_path: Path) -> None:
    with folder_of(tmp_path, "--no-stream") as (source, overlays, mount):
        data = source.data()
        with opened(mount.path("a.raw")) as fd:
            overlay = os.open(overlays / "a.qed", os.O_RDONLY)
            (overlays / "a.qed").unlink()
            wait_for(lambda: "a.raw" not in os.listdir(mount.mountpoint), "end of an image")
            assert os.pread(fd, MIB, 3 * MIB) == data[3 * MIB : 4 * MIB]
            assert os.pwrite(fd, b"still here", 0) == 10
            os.fsync(fd)
            assert os.pread(fd, 10, 0) == b"still here"
            assert os.fstat(fd).st_size == SIZE
        os.close(overlay)
        assert_same(mount.path("b.raw"), source.raw)
        assert mount.unmount() == 0


def test_an_overlay_renamed_is_an_image_renamed(tmp_path: Path) -> None:
    with folder_of(tmp_path) as (source, overlays, mount):
        with mount.path("a.raw").open("r+b") as image:
            image.write(b"mine")
        (overlays / "a.qed").rename(overlays / "z.qed")
        wait_for(lambda: sorted(os.listdir(mount.mountpoint)) == ["b.raw", "c.raw", "z.raw"], "the new name")
        expected = b"mine" + source.data()[4:]
        assert mount.path("z.raw").read_bytes() == expected
        mount.wait()


def test_a_replaced_overlay_is_another_image(tmp_path: Path) -> None:
    with folder_of(tmp_path, "--no-stream") as (source, overlays, mount):
        assert_same(mount.path("a.raw"), source.raw)
        other = qemu_create(tmp_path / "other.qed", size=MIB)
        qemu_io(other, "write -P 5 0 1M")
        other.replace(overlays / "a.qed")

        def replaced() -> bool:
            try:
                return mount.path("a.raw").stat().st_size == MIB
            except OSError:  # between the two
                return False

        wait_for(replaced, "the new overlay")
        assert mount.path("a.raw").read_bytes() == b"\5" * MIB


def test_an_overlay_that_is_repaired_is_served(tmp_path: Path) -> None:
    with folder_of(tmp_path) as (_, overlays, mount):
        bad = overlays / "bad.qed"
        bad.write_text("not yet")
        wait_for(lambda: "not a QED image" in _error(mount, "bad.raw"), "the broken one")
        assert mount.image("bad.raw")["state"] == "broken"
        qemu_create(bad, size=MIB)
        wait_for(lambda: mount.image("bad.raw")["state"] == "complete", "a served image")
        assert mount.path("bad.raw").read_bytes() == bytes(MIB)


def test_a_copy_that_stalls_is_served_when_it_has_ended(tmp_path: Path) -> None:
    """As long as `cp` has the file open it is not touched, and `status` says why it is not served."""
    with folder_of(tmp_path, "--no-stream") as (_, overlays, mount):
        whole = qemu_create(tmp_path / "whole.qed", size=MIB)
        qemu_io(whole, "write -P 5 0 1M")
        data = whole.read_bytes()
        half = len(data) // 2
        with (overlays / "copy.qed").open("wb", buffering=0) as copy:
            copy.write(data[:half])
            wait_for(lambda: "open for writing" in _error(mount, "copy.raw"), "the copy in the list")
            assert (mount.image("copy.raw")["state"], mount.image("copy.raw")["exit_code"]) == ("broken", 8)
            assert (overlays / "copy.qed").read_bytes() == data[:half]
            copy.write(data[half:])
        wait_for(mount.path("copy.raw").exists, "the image of the whole copy")
        assert mount.path("copy.raw").read_bytes() == b"\5" * MIB
        assert mount.output().count("copy.qed: another program") == 1


def _error(mount: Mount, name: str) -> str:
    return next((image["error"] or "" for image in mount.status()["images"] if image["name"] == name), "")


def test_an_overlay_in_use_is_served_once_it_is_free(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with origin(tmp_path, SIZE) as source:
        create(overlays / "a.qed", source.url)
        create(overlays / "b.qed", source.url)
        with mounted(overlays / "a.qed", tmp_path / "first"), mounted(overlays, tmp_path / "second") as second:
            assert os.listdir(second.mountpoint) == ["b.raw"]
            image = second.image("a.raw")
            assert (image["state"], image["exit_code"]) == ("broken", 8)
            assert_same(second.path("b.raw"), source.raw)
            qedfs("umount", tmp_path / "first")
            wait_for(second.path("a.raw").exists, "the overlay that is free now")
            assert_same(second.path("a.raw"), source.raw)


def test_names_that_are_not_plain(tmp_path: Path) -> None:
    overlays = tmp_path / "over lays, 1"
    overlays.mkdir()
    names = ["a b", "ä-ö", "-x", "x.raw", "comma,backslash\\", "a" * 200]
    for name in names:
        qemu_create(overlays / f"{name}.qed", size=MIB)
    not_utf8 = Path(os.fsdecode(os.fsencode(overlays) + b"/\xff.qed"))
    shutil.copy(overlays / "a b.qed", not_utf8)
    with mounted(overlays, tmp_path / "m n t") as mount:
        found = os.listdir(mount.mountpoint)
        assert sorted(found) == sorted(f"{name}.raw" for name in (*names, not_utf8.stem))
        assert all(mount.path(name).stat().st_size == MIB for name in found)
        assert sorted(image["name"] for image in mount.status()["images"]) == sorted(found)
        assert mount.unmount() == 0


def test_other_sockets_and_devices_are_not_opened(tmp_path: Path) -> None:
    overlays = tmp_path / "o"
    overlays.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(overlays / "socket.qed"))
        qemu_create(overlays / "good.qed", size=MIB)
        with mounted(overlays, tmp_path / "mnt") as mount:
            assert os.listdir(mount.mountpoint) == ["good.raw"]
            assert mount.image("socket.raw")["state"] == "broken"


def test_qemu_reads_what_was_unmounted_half_way(tmp_path: Path) -> None:
    with folder_of(tmp_path, "--no-stream") as (source, overlays, mount):
        assert mount.path("a.raw").read_bytes()[:100] == source.data()[:100]
        with mount.path("b.raw").open("rb") as image:
            image.seek(5 * MIB)
            image.read(MIB)
        assert mount.unmount() == 0
        for name in "abc":
            assert qemu_same(overlays / f"{name}.qed", source.raw)


def test_another_name_of_a_served_overlay_is_told_as_that(tmp_path: Path) -> None:
    """Nobody else has it: a hard link, or a rename under a guest, which is served when the guest has ended."""
    with folder_of(tmp_path, "--no-stream") as (source, overlays, mount):

        def error(name: str) -> str | None:
            found: dict[str, str | None] = {image["name"]: image["error"] for image in mount.status()["images"]}
            return found.get(name, "is not there")

        (overlays / "link.qed").hardlink_to(overlays / "b.qed")
        wait_for(lambda: error("link.raw") not in ("is not there", None), "notice of the link")
        assert error("link.raw") == f"{overlays}/link.qed: is the same file as b.qed, which is served as b.raw"
        with opened(mount.path("a.raw")) as fd:
            (overlays / "a.qed").rename(overlays / "new.qed")
            wait_for(lambda: error("new.raw") not in ("is not there", None), "notice of the new name")
            expected = "was a.qed, whose image a.raw is still open; it will be served when that is closed"
            assert error("new.raw") == f"{overlays}/new.qed: {expected}"
            assert os.pwrite(fd, b"guest", 0) == 5
        wait_for(lambda: error("new.raw") is None, "the image under its new name")
        assert mount.path("new.raw").read_bytes() == b"guest" + source.data()[5:]
        (overlays / "b.qed").unlink()
        wait_for(lambda: error("link.raw") is None, "the image of the link")
        assert_same(mount.path("link.raw"), source.raw)
        # Each is told once.
        assert mount.output().count("is the same file as") == mount.output().count("was a.qed") == 1
        assert "in use by another program" not in mount.output()
        assert mount.unmount() == 0
