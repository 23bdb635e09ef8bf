"""When `--until-streamed` ends: not before the last overlay is complete, and also if one can never become so."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from qedfs.control.qmp.client import Client
from tests.harness.hang import HANG_SECONDS
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for
from tests.harness.require import require, require_root
from tests.mount.support import assert_whole, create, opened, origin

CHANGE_SECONDS = 0.02  # far more often than a file settles


def test_a_failed_stream_ends_it_with_the_exit_code_of_the_failure(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    (tmp_path / "mnt").mkdir()
    with origin(tmp_path) as source:
        create(overlays / "good.qed", source.url)
        create(overlays / "gone.qed", f"{source.server.url}/none", "--offline", "--size", "1M")
        done = qedfs("mount", overlays, tmp_path / "mnt", "--until-streamed", check=False)
    assert done.returncode == 4
    assert "404" in done.stderr.splitlines()[-1]
    assert '"backing": null' in qedfs("info", overlays / "good.qed", "--json").stdout


def test_a_broken_overlay_ends_it_with_the_exit_code_of_a_bad_overlay(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    (tmp_path / "mnt").mkdir()
    (overlays / "text.qed").write_text("no overlay")
    with origin(tmp_path) as source:
        create(overlays / "good.qed", source.url)
        done = qedfs("mount", overlays, tmp_path / "mnt", "--until-streamed", check=False)
    assert done.returncode == 3
    assert "text.qed" in done.stderr.splitlines()[-1]


def test_an_overlay_that_cannot_be_written_ends_it_with_an_error(tmp_path: Path) -> None:
    require_root()
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    (tmp_path / "mnt").mkdir()
    with origin(tmp_path) as source:
        create(overlays / "good.qed", source.url)
        fixed = create(overlays / "fixed.qed", source.url)
        with read_only(fixed):
            done = qedfs(
                "mount", overlays, tmp_path / "mnt", "--until-streamed", check=False, timeout_seconds=HANG_SECONDS
            )
    assert done.returncode == 1
    assert "fixed.qed: is read-only and keeps nothing" in done.stderr.splitlines()[-1]
    assert '"backing": null' in qedfs("info", overlays / "good.qed", "--json").stdout


@contextlib.contextmanager
def changing(path: Path) -> Iterator[Path]:
    """Something that goes on changing the file, wherever it is moved, so that it does not settle."""
    end = threading.Event()

    def change(fd: int) -> None:
        while not end.wait(CHANGE_SECONDS):
            os.utime(fd)

    with opened(path, os.O_RDONLY) as fd:
        thread = threading.Thread(target=change, args=(fd,))
        thread.start()
        try:
            yield path
        finally:
            end.set()
            thread.join()


def test_it_stays_for_an_overlay_that_has_just_come(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with origin(tmp_path) as source:
        create(overlays / "first.qed", source.url)
        with mounted(overlays, tmp_path / "mnt", "--until-streamed") as mount:
            with opened(mount.path("first.raw")), Client.connect(str(mount.mountpoint)) as client:
                mount.wait("first")
                with changing(create(tmp_path / "second.qed", source.url)) as second:
                    second.rename(overlays / "second.qed")
                    client.execute("x-qedfs-rescan")
                    assert mount.image("second.raw")["served"] is False
            assert mount.wait_exit() == 0
        assert_whole(overlays / "second.qed", source.raw)


def test_it_stays_for_an_overlay_that_is_being_copied(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with origin(tmp_path) as source:
        copied = create(tmp_path / "copied.qed", source.url).read_bytes()
        create(overlays / "first.qed", source.url)
        with mounted(overlays, tmp_path / "mnt", "--until-streamed") as mount:
            with (overlays / "second.qed").open("wb", buffering=0) as copy:
                with opened(mount.path("first.raw")):
                    copy.write(copied[:4096])
                    mount.wait("first")
                    wait_for(lambda: states(mount).get("second.raw") == "broken", "a look at a copy that stalls")
                time.sleep(0.5)  # nobody has an image open now
                assert mount.returncode is None
                copy.write(copied[4096:])
            assert mount.wait_exit() == 0
        assert_whole(overlays / "second.qed", source.raw)


def test_it_stays_for_an_image_whose_overlay_has_left_the_folder(tmp_path: Path) -> None:
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    with origin(tmp_path) as source:
        for name in "abc":
            create(overlays / f"{name}.qed", source.url)
        with mounted(overlays, tmp_path / "mnt", "--until-streamed") as mount:
            with opened(mount.path("a.raw")) as renamed, opened(mount.path("b.raw")) as removed:
                mount.wait()
                (overlays / "b.qed").unlink()
                (overlays / "a.qed").rename(overlays / "d.qed")
                wait_for(lambda: states(mount) == {"c.raw": "complete", "d.raw": "broken"}, "the end of two overlays")
                time.sleep(0.5)  # longer than it takes to look whether it may end
                assert mount.returncode is None
                for image in (renamed, removed):
                    assert os.pwrite(image, b"guest", 4096) == 5
                    os.fsync(image)
            assert mount.wait_exit() == 0
        assert_whole(overlays / "c.qed", source.raw)
        with mounted(overlays / "d.qed", tmp_path / "mnt") as mount, opened(mount.path("d.raw")) as image:
            assert os.pread(image, 5, 4096) == b"guest"


def states(mount: Mount) -> dict[str, str]:
    """The state of each image by its name."""
    return {image["name"]: image["state"] for image in mount.status()["images"]}


@contextlib.contextmanager
def read_only(file: Path) -> Iterator[None]:
    """A file that nobody can open for writing: for root a mode is no obstacle."""
    subprocess.run([require("mount"), "--bind", file, file], check=True)
    try:
        subprocess.run([require("mount"), "-o", "remount,bind,ro", file], check=True)
        yield
    finally:
        subprocess.run([require("umount"), file], check=True)
