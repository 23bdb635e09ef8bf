"""An overlay that is cut, overwritten or replaced under its mount: no invented byte, and nobody is told "complete"."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.images import qemu_create
from tests.harness.mounts import Mount, mounted, qedfs
from tests.harness.process import wait_for

from .support import MIB, Origin, create, opened, origin, read_direct, write_direct

SIZE = 8 * MIB
BAD_OVERLAY = 3  # the exit code


def cut(overlay: Path) -> None:
    os.truncate(overlay, MIB)


def overwrite(overlay: Path) -> None:
    """With another overlay of the same shape, which is larger: `cp` opens the same file."""
    other = overlay.with_name("other")
    qemu_create(other, size=SIZE)
    os.truncate(other, 2 * SIZE)
    shutil.copyfile(other, overlay)
    other.unlink()


def wrong_pieces(image: Path, data: bytes) -> tuple[int, int]:
    """How many pieces of 64 KiB read as something that nobody has written, and how many not at all."""
    wrong = errors = 0
    for pos in range(0, len(data), 65536):
        try:
            wrong += read_direct(image, pos, 65536) != data[pos : pos + 65536]
        except OSError:
            errors += 1
    return wrong, errors


def state(mount: Mount) -> tuple[str, str]:
    found = mount.image()
    return found["state"], found["error"] or ""


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(("harm", "words"), [(cut, "was truncated to"), (overwrite, "was overwritten")])
def test_harm_is_noticed_and_told_by_all(
    tmp_path: Path, harm: Callable[[Path], None], words: str, *, complete: bool
) -> None:
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt", *([] if complete else ["--no-stream"])) as mount:
            image, data = mount.path("disk.raw"), source.data()
            if complete:
                mount.wait()
            else:
                read_direct(image, 0, 4 * MIB)
                # A reader has his bytes before they are adopted; what is not in the overlay yet cannot be lost with it.
                wait_for(lambda: mount.image()["populated"] >= 4 * MIB, "adoption")
            harm(overlay)
            wait_for(lambda: state(mount)[0] == "failed", "notice of it")
            assert words in state(mount)[1]
            wrong, errors = wrong_pieces(image, data)
            assert wrong == 0
            assert errors >= 40
            with pytest.raises(OSError, match="Input/output error"):
                write_direct(image, 0, data[:4096])
            done = qedfs("wait", mount.mountpoint, check=False)
            assert (done.returncode, words in done.stderr) == (BAD_OVERLAY, True)
            done = qedfs("umount", mount.mountpoint, check=False)
            assert (done.returncode, words in done.stderr) == (BAD_OVERLAY, True)
            assert mount.wait_exit() == BAD_OVERLAY
        if harm is cut and complete:
            # Its header refers to no backing.
            done = qedfs("wait", tmp_path / "mnt", "--overlay", overlay, check=False)
            assert (done.returncode, "the file was cut" in done.stderr) == (BAD_OVERLAY, True)


def test_a_read_and_a_write_notice_a_cut_at_once(tmp_path: Path) -> None:
    """Not with the next look: a write behind the end would bring zeros to where other clusters were."""
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt") as mount:
            mount.wait()
            image = mount.path("disk.raw")
            with opened(image, os.O_RDWR | os.O_DSYNC):
                cut(overlay)
                with pytest.raises(OSError, match="Input/output error"):
                    write_direct(image, SIZE - 4096, b"w" * 4096)
                assert wrong_pieces(image, source.data())[0] == 0
            assert overlay.stat().st_size == MIB


def _replaced(source: Origin, overlay: Path) -> None:
    """Another overlay takes the name, as an editor or `mv` does it."""
    create(overlay.with_name("new.qed"), source.url).replace(overlay)


def test_a_file_that_takes_the_place_of_a_mounted_overlay_is_not_complete(tmp_path: Path) -> None:
    """What is mounted is the file that was there: it reads on, and is lost at the end."""
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt") as mount:
            mount.wait()
            _replaced(source, overlay)
            wait_for(lambda: state(mount)[0] == "failed", "notice of it")
            assert "is another file now; the mounted one was removed and ends with the mount" in state(mount)[1]
            assert wrong_pieces(mount.path("disk.raw"), source.data()) == (0, 0)
            assert qedfs("wait", mount.mountpoint, check=False).returncode == BAD_OVERLAY


def test_a_removed_overlay_lives_as_long_as_its_mount(tmp_path: Path) -> None:
    """As every open file does; and a renamed one too."""
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt", "--limit", "2M") as mount:
            overlay.unlink()
            mount.wait()
            assert wrong_pieces(mount.path("disk.raw"), source.data()) == (0, 0)
            assert mount.unmount() == 0


def test_an_overlay_that_was_cut_before_it_was_mounted_never_becomes_complete(tmp_path: Path) -> None:
    """Its stream has nothing left to bring in, and its source has what was lost."""
    with origin(tmp_path, SIZE) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
            read_direct(mount.path("disk.raw"), 0, 4 * MIB)
            assert mount.unmount() == 0
        os.truncate(overlay, 3 * MIB)
        for _ in range(2):  # the second session finds what the first one has marked
            with mounted(overlay, tmp_path / "mnt", "--no-stream") as mount:
                wait_for(lambda: state(mount)[0] == "failed", "notice of it")
                assert "the file was cut; run qedfs check" in state(mount)[1]
                qedfs("stream", "start", mount.mountpoint)
                wait_for(lambda: mount.image()["populated"] == SIZE and state(mount)[0] == "failed", "the end of it")
                assert qedfs("wait", mount.mountpoint, check=False).returncode == BAD_OVERLAY
                assert mount.image()["backing"] is not None
                assert mount.unmount() == 0
        found: dict[str, Any] = mount_info(overlay)
        assert found["complete"] is False
        assert "the file was cut" in found["damage"]


def mount_info(overlay: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qedfs("info", overlay, "--json").stdout)
    return found
