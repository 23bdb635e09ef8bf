"""An image ends when its overlay has left the folder and nobody has it open, and its last flush is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from qedfs.errors import InStandby, NoSpace, QedfsError
from qedfs.format.record import Standby
from qedfs.image.condition import Cause
from qedfs.image.image import Image
from qedfs.image.write_gate import Writes
from qedfs.jobs.state import State
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.overlay.create import create_overlay
from qedfs.overlay.open import open_overlay
from qedfs.overlay.storage import FileStorage
from qedfs.source.policy import Policy
from tests.harness.hang import HANG_SECONDS

Leave = Callable[[Path], object]


def renamed(overlay: Path) -> None:
    overlay.rename(overlay.with_suffix(".away"))


@pytest.fixture
def failing_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last flush of every image fails."""
    close = Image.close

    async def fail(image: Image) -> None:
        await close(image)
        raise NoSpace(f"{image.name}: no room")

    monkeypatch.setattr(Image, "close", fail)


@pytest.mark.expect_log("disk.raw: no room")
@pytest.mark.usefixtures("failing_flush")
@pytest.mark.parametrize(
    ("leave", "lost"),
    [
        pytest.param(renamed, ["disk.raw: no room"], id="renamed"),
        # Nobody can read what is in a file that has no name.
        pytest.param(Path.unlink, [], id="deleted"),
    ],
)
async def test_a_lost_write_is_reported_at_the_end_unless_the_overlay_is_deleted(
    tmp_path: Path, leave: Leave, lost: list[str]
) -> None:
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=65536, backing=None)
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(), nursery)
        await images.registry.scan()
        leave(overlay)
        assert await images.registry.scan_if_changed()
        assert images.registry.including_removed() == set()
        assert not images.registry.in_use
        assert [str(error) for error in await images.close()] == lost
        nursery.cancel_scope.cancel()


async def test_an_open_image_lives_on_without_its_overlay_in_the_folder(tmp_path: Path) -> None:
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=65536, backing=None)
    forgotten: list[str] = []
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(), nursery, forget=forgotten.append)
        registry = images.registry
        await registry.scan()
        (served,) = registry.everything()
        assert served.image is not None
        served.note_open()
        renamed(overlay)
        await registry.scan()
        assert (registry.everything(), registry.images(), forgotten) == ([], [], ["disk.raw"])
        assert (registry.by_inode(served.inode), registry.in_use) == (served, True)
        await served.image.write(0, b"guest")
        served.note_release()
        await registry.close_if_unused(served)
        assert (registry.by_inode(served.inode), registry.in_use) == (None, False)
        assert await images.close() == []
        nursery.cancel_scope.cancel()
    assert b"guest" in overlay.with_suffix(".away").read_bytes()


@pytest.mark.expect_log("disk.raw: internal error", "disk.raw: the stream has stopped")
@pytest.mark.parametrize("place", ["a task", "the rounds"])
async def test_a_bug_costs_its_image_only(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("disk", "other"):
        create_overlay(str(tmp_path / f"{name}.qed"), image_size=65536, backing="http://127.0.0.1:1/disk")

    def look(image: Image) -> bool:
        if image.name == "disk.raw" and place == "the rounds":
            raise RuntimeError("a bug")
        return False

    async def tend(image: Image) -> None:
        if image.name == "disk.raw":
            raise RuntimeError("a bug")

    monkeypatch.setattr("qedfs.mount.rounds.ROUND_SECONDS", 0.01)
    monkeypatch.setattr("qedfs.mount.rounds.COMMIT_SECONDS", 0.01)
    monkeypatch.setattr(Image, "calm", property(look))
    monkeypatch.setattr(Image, "tend", tend)
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(stream=False), nursery)
        await images.registry.scan()
        disk, other = images.registry.everything()
        with trio.move_on_after(HANG_SECONDS):
            while not disk.troubles:  # noqa: ASYNC110 - no event tells
                await trio.sleep(0.01)
        assert {str(trouble.error) for trouble in disk.troubles} == {"internal error, see the log"}
        assert disk.troubles[0].cause is Cause.INTERNAL_ERROR
        # Whoever waits for the stream must learn that nothing works at it any more.
        assert disk.job is not None
        assert (disk.job.state, disk.job.reason) == (State.FAILED, "internal error, see the log")
        assert other.troubles == []
        assert await images.close() == []
        nursery.cancel_scope.cancel()


async def test_an_activation_that_the_disk_took_too_late_is_taken_back_before_the_overlay_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source.raw").write_bytes(bytes(65536))
    overlay = tmp_path / "disk.qed"
    create_overlay(str(overlay), image_size=65536, backing=str(tmp_path / "source.raw"), standby=True)
    answers, in_thread = trio.Event(), FileStorage.in_thread
    answers.set()

    async def hanging(storage: FileStorage, function: Callable[[], object]) -> object:
        await answers.wait()
        return await in_thread(storage, function)

    monkeypatch.setattr(FileStorage, "in_thread", hanging)
    monkeypatch.setattr("qedfs.mount.cut_over.RECORD_SECONDS", 0.05)
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(stream=False, policy=Policy((str(tmp_path),))), nursery)
        await images.registry.scan()
        (served,) = images.registry.everything()
        assert served.image is not None
        await served.image.flush()  # so that the close has nothing to wait for but the record
        answers = trio.Event()
        with pytest.raises(QedfsError, match="stays in standby: the disk of its overlay"):
            await images.cut_over.activate(served)
        async with trio.open_nursery() as closing:
            closing.start_soon(images.close)
            await trio.testing.wait_all_tasks_blocked()
            answers.set()
        nursery.cancel_scope.cancel()
    found = await open_overlay(str(overlay), writable=False)
    assert found.record.standby is Standby.WAITING
    await found.close()


async def test_a_write_in_standby_is_held_as_long_as_the_kernel_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_overlay(str(tmp_path / "disk.qed"), image_size=65536, backing="http://127.0.0.1:1/disk", standby=True)
    monkeypatch.setattr("qedfs.mount.opener.most_wait_seconds", lambda: 0.01)
    async with trio.open_nursery() as nursery:
        images = Images(str(tmp_path), Options(standby_writes=Writes.HOLD), nursery)
        await images.registry.scan()
        (served,) = images.registry.everything()
        assert served.image is not None
        with pytest.raises(InStandby, match=r"not activated within 0\.01 s"):
            await served.image.write(0, b"guest")
        assert await images.close() == []
        nursery.cancel_scope.cancel()
