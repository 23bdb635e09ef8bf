"""A server is killed while the disk takes the record of an activation that was given up: the next one takes it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import trio

from qedfs.format.record import Pin, Standby, digest
from qedfs.image.standby_record import record_active
from qedfs.mount.held import HolderLink
from qedfs.mount.images import Images
from qedfs.mount.late_records import LateRecords
from qedfs.mount.options import Options
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay

BACKING = "http://127.0.0.1:1/disk"


class Link(HolderLink):
    """What the holder keeps."""

    def __init__(self, kept: Mapping[str, str]) -> None:
        super().__init__()
        self.kept = dict(kept)

    def __bool__(self) -> bool:
        return True

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value

    def drop(self, key: str) -> None:
        self.kept.pop(key, None)


async def activated(path: Path, *, late: bool) -> dict[str, str]:
    """An overlay whose record says that it is active; what a server that was killed then has told of it."""
    create_overlay(str(path), image_size=65536, backing=BACKING, standby=True)
    overlay, link = await open_overlay(str(path), writable=True), Link({})
    records = LateRecords(link, {})
    records.note(overlay)
    await record_active(overlay, Pin(digest(BACKING), 65536, etag="v1"))
    if not late:
        records.forget(overlay)
    await overlay.close()
    return link.kept


async def served(path: Path, kept: Mapping[str, str]) -> tuple[bool, dict[str, str]]:
    """Whether the next server has it in standby, and what it leaves with the holder."""
    link = Link(kept)
    async with trio.open_nursery() as nursery:
        images = Images(str(path.parent), Options(stream=False), nursery, link=link, values=kept)
        await images.registry.scan()
        (found,) = images.registry.everything()
        assert found.image is not None
        standby = found.image.in_standby
        assert await images.close() == []
        nursery.cancel_scope.cancel()
    return standby, {key: value for key, value in link.kept.items() if key.startswith("late/")}


async def test_the_next_server_takes_it_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    kept = await activated(path, late=True)
    assert await served(path, kept) == (True, {})
    overlay = await open_overlay(str(path), writable=True)
    assert overlay.record.standby is Standby.WAITING
    assert overlay.record.pin == Pin(digest(BACKING), 65536)  # as the source goes on changing
    await overlay.change_record(lambda record: dataclasses.replace(record, standby=Standby.REVOCABLE))
    await overlay.close()
    # A later activation counts.
    assert await served(path, {}) == (False, {})


async def test_an_activation_that_came_in_time_counts(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    assert await served(path, await activated(path, late=False)) == (False, {})
