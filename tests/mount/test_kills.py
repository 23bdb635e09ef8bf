"""kill -9 of qedfs in the middle of writes and stream: every write that returned is there, all else is the origin.

Also while the image grows, gets another source or is copied, and of commands that change an overlay. More of each:
`contrib/killloop`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.harness.images import qemu_check, qemu_info, qemu_same

from .kills import Overlay, kill_once
from .kills_beside import Growing, Moving, Snapping
from .kills_of_commands import Commands
from .support import MIB, Origin, create, mounted_over, origin
from .test_snapshot import sharing


@pytest.mark.parametrize("seed", range(2))
def test_kills(tmp_path: Path, seed: int) -> None:
    """Two kills of one overlay: the second finds what the first has left. The limit lets them hit the stream."""
    with origin(tmp_path, 12 * MIB, seed=seed) as source:
        overlay = create(tmp_path / "disk.qed", source.url, "--cluster-size", ("64K", "4K")[seed % 2])
        expected = Path(shutil.copy(source.raw, tmp_path / "expected"))
        target = Overlay(overlay, expected, tmp_path / "mnt")
        for round_ in range(2):
            kill_once(target, 100 * seed + round_, "--limit", "8M")
        with mounted_over(tmp_path, source.url) as mount:
            mount.wait()
            assert mount.unmount() == 0
    # A kill may leave leaks, nothing else.
    assert qemu_check(overlay).corruptions == 0
    assert "backing-filename" not in qemu_info(overlay)
    assert qemu_same(overlay, expected)


def fresh(folder: Path, source: Origin, backing: str = "") -> Overlay:
    """An overlay that nobody has killed yet."""
    overlay = create(folder / "disk.qed", backing or source.url)
    return Overlay(overlay, Path(shutil.copy(source.raw, folder / "expected")), folder.parent / "mnt")


def mirrored(source: Origin) -> tuple[str, str]:
    """Two addresses of the source."""
    source.raw.with_name("mirror").hardlink_to(source.raw)
    return source.url, f"{source.server.url}/mirror"


def test_killed_while_it_grows(tmp_path: Path) -> None:
    with origin(tmp_path, 8 * MIB) as source:
        target = fresh(tmp_path, source)
        growing = Growing(target, 1)
        kill_once(target, 1, "--limit", "1M", beside=growing.running, settled=growing.settled)


def test_killed_while_it_gets_another_source(tmp_path: Path) -> None:
    with origin(tmp_path, 8 * MIB) as source:
        target = fresh(tmp_path, source)
        moving = Moving(mirrored(source))
        kill_once(target, 2, "--limit", "1M", beside=moving.running, settled=moving.settled)


@pytest.mark.slow
def test_killed_while_it_is_copied(tmp_path: Path) -> None:
    with origin(tmp_path, 8 * MIB) as source, sharing(tmp_path, "xfs") as place:
        target = fresh(place, source)
        snapping = Snapping(target, source.raw, 3)
        for seed in (3, 4):
            kill_once(target, seed, "--limit", "1M", beside=snapping.running, settled=snapping.settled)
        assert snapping.done


@pytest.mark.parametrize("command", ["commit", "rebase"])
def test_a_command_that_is_killed(command: str, tmp_path: Path) -> None:
    with origin(tmp_path, 4 * MIB) as source:
        if command == "commit":
            backing = Path(shutil.copy(source.raw, tmp_path / "backing"))
            target = fresh(tmp_path, source, str(backing))
            words: list[str | Path] = ["commit", target.path, "--quiet", "--allow-backing", tmp_path]
            killed = Commands(target, lambda: words, backing, "--allow-backing", tmp_path, named=lambda: [str(backing)])
        else:
            target = fresh(tmp_path, source)
            urls = list(mirrored(source))

            def rebase() -> Sequence[str | Path]:
                urls.reverse()
                return ["rebase", target.path, "--force", "--quiet", "--backing", urls[0]]

            killed = Commands(target, rebase, source.raw, named=lambda: urls)
        killed.kill_once(5)
        assert killed.kills == 1
