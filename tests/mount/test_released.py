"""Which files a mount leaves alone, over two servers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from qedfs.errors import Inaccessible
from qedfs.mount.held import HolderLink
from qedfs.mount.overlay_folder import OverlayFolder
from qedfs.mount.released import Released
from qedfs.mount.served import Served

from .test_inode_numbers import Values


@contextlib.contextmanager
def released(folder: Path, link: Values) -> Iterator[Released]:
    """The list of a server that gets what the link has by now."""
    place = OverlayFolder(str(folder))
    found = Released(place, cast("HolderLink", link), dict(link.values))
    try:
        yield found
    finally:
        found.close()
        place.close()


def overlay(folder: Path, name: str = "disk") -> Served:
    path = folder / f"{name}.qed"
    path.write_bytes(b"QED")
    return Served(f"{name}.raw", str(path), 2, (path.stat().st_ino, 3, 0))


def test_a_server_that_was_killed_before_the_end_leaves_the_order(tmp_path: Path) -> None:
    link, served = Values(), overlay(tmp_path)
    with released(tmp_path, link) as first:
        assert not first.is_ordered(served)
        first.note_order(served)
        first.add(served)
        assert os.stat(served.path) in first
    with released(tmp_path, link) as second:
        assert second.is_ordered(served)
        assert os.stat(served.path) not in second
        second.take_back(served)
        assert not second.is_ordered(served)
    assert not link.values


def test_a_server_that_was_killed_after_the_end_leaves_the_file_alone(tmp_path: Path) -> None:
    link, served = Values(), overlay(tmp_path)
    with released(tmp_path, link) as first:
        first.note_order(served)
        first.add(served)
        first.note_done(served)
    with released(tmp_path, link) as second:
        assert not second.is_ordered(served)
        assert second.overlays() == {"disk.raw": served.path}
        os.rename(served.path, tmp_path / "moved.qed")
        assert (tmp_path / "moved.qed").stat() in second
        assert second.forget("disk.raw")
        assert not second.forget("disk.raw")
    assert not link.values


def test_another_file_of_the_same_name_is_served(tmp_path: Path) -> None:
    link, served = Values(), overlay(tmp_path)
    with released(tmp_path, link) as first:
        first.add(served)
        first.note_done(served)
        os.unlink(served.path)
        # Without the descriptor, a file system may well give this one the number of the other.
        again = overlay(tmp_path)
        assert os.stat(again.path) not in first
        first.keep_only([again.stamp[0]])
        assert not first.overlays()
        assert not link.values
        first.add(again)
        first.note_done(again)
        os.rename(again.path, tmp_path / "away")
        overlay(tmp_path)
    with released(tmp_path, link) as second:
        assert not second.overlays()


def test_of_a_file_that_left_between_two_servers_nothing_is_kept(tmp_path: Path) -> None:
    link, served = Values(), overlay(tmp_path)
    with released(tmp_path, link) as first:
        first.add(served)
        first.note_done(served)
        os.rename(served.path, tmp_path / "away")
    with released(tmp_path, link) as second:
        assert not second.overlays()
    # Otherwise a third server would leave a later overlay of this name alone that has got the number.
    assert not link.values


def test_a_file_that_is_not_what_was_served_is_refused(tmp_path: Path) -> None:
    served = overlay(tmp_path)
    os.rename(served.path, tmp_path / "away")
    with released(tmp_path, Values()) as found:
        with pytest.raises(Inaccessible, match="No such file"):
            found.add(served)
        overlay(tmp_path)
        with pytest.raises(Inaccessible, match="is another file now"):
            found.add(served)
        assert not found.overlays()
