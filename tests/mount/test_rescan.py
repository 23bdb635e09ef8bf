"""A scan of the folder that is cancelled or fails leaves nothing behind, and is repeated."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from qedfs.errors import BadOverlay, QedfsError
from qedfs.image.condition import Cause
from qedfs.jobs.job import Driver, Job
from qedfs.jobs.state import State
from qedfs.mount import source_pool
from qedfs.mount.images import Images
from qedfs.mount.options import Options
from qedfs.mount.registry import Registry
from qedfs.overlay.create import create_overlay
from qedfs.overlay.overlay import Overlay
from qedfs.overlay.storage import FileStorage
from qedfs.source.policy import Policy
from qedfs.source.url import Location
from tests.harness.require import require

from .support import small_disk


def create(overlay: Path) -> None:
    """An overlay over HTTP that has come to rest."""
    create_overlay(str(overlay), image_size=65536, backing="http://127.0.0.1:1/disk")
    os.utime(overlay, (1, 1))


@contextlib.asynccontextmanager
async def empty_folder(path: Path) -> AsyncIterator[Registry]:
    """A folder that was scanned when it was empty."""
    os.mkdir(path)
    async with trio.open_nursery() as nursery:
        images = Images(str(path), Options(stream=False), nursery)
        await images.registry.scan()
        try:
            yield images.registry
        finally:
            with trio.CancelScope(shield=True):
                assert await images.close() == []
            nursery.cancel_scope.cancel()


async def cancelled_scan(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan, and be cancelled while the policy checks a backing."""
    scope = trio.CancelScope()

    async def hang_up(_: Location, __: Policy) -> None:
        scope.cancel()
        await trio.sleep_forever()

    with monkeypatch.context() as patch, scope:
        patch.setattr(source_pool, "allowed", hang_up)
        await registry.rescan()
    assert scope.cancelled_caught


async def test_a_cancelled_scan_closes_the_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = tmp_path / "o" / "new.qed"
    async with empty_folder(overlay.parent) as registry:
        create(overlay)
        await cancelled_scan(registry, monkeypatch)
        FileStorage.open(str(overlay), writable=True).close()  # InUse, were it still held
        assert registry.everything() == []
        os.utime(overlay, (1, 1))  # giving it up may have marked it clean
        assert await registry.scan_if_changed()
        (served,) = registry.everything()
        assert served.image is not None


@contextlib.contextmanager
def over(file: Path, place: Path) -> Iterator[None]:
    """`file`, of another file system, bound over `place`."""
    subprocess.run([require("mount"), "--bind", file, place], check=True)
    try:
        yield
    finally:
        subprocess.run([require("umount"), "--lazy", place], check=True)


async def test_files_of_two_file_systems_with_one_inode_number_are_two_overlays(tmp_path: Path) -> None:
    with contextlib.ExitStack() as mounts:
        async with empty_folder(tmp_path / "o") as registry:
            files = []
            for name in ("a.qed", "b.qed"):
                disk = mounts.enter_context(small_disk(tmp_path / f"disk-{name}", 1 << 20))
                files.append(disk / name)
                create(disk / name)
                place = tmp_path / "o" / name
                place.touch()
                mounts.enter_context(over(disk / name, place))
            numbers = {file.stat().st_ino for file in files}
            devices = {file.stat().st_dev for file in files}
            assert (len(numbers), len(devices)) == (1, 2)
            await registry.rescan()
            assert [served.error for served in registry.everything()] == [None, None]
            assert [served.image is not None for served in registry.everything()] == [True, True]


async def test_a_failed_scan_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = tmp_path / "o" / "new.qed"

    def no_descriptor(_: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with empty_folder(overlay.parent) as registry:
        create(overlay)
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", no_descriptor)
            with pytest.raises(OSError, match="Too many open files"):
                await registry.scan_if_changed()
        assert await registry.scan_if_changed()
        (served,) = registry.everything()
        assert served.image is not None
        assert not await registry.scan_if_changed()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
async def test_a_transient_error_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """It leaves no trace in the file."""
    overlay = tmp_path / "o" / "new.qed"

    def failing(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    async with empty_folder(overlay.parent) as registry:
        create(overlay)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open" if number == errno.EMFILE else "preadv", failing)
            since = set()
            for _ in range(2):
                assert await registry.scan_if_changed(retry=True)
                (served,) = registry.everything()
                (trouble,) = served.troubles
                assert trouble.cause is Cause.NOT_SERVED
                since.add(trouble.since)
            assert len(since) == 1
        assert len(caplog.records) == 1
        assert await registry.scan_if_changed(retry=True)
        (served,) = registry.everything()
        assert served.image is not None
        assert not await registry.scan_if_changed(retry=True)


@pytest.mark.expect_log("internal error")
async def test_a_bug_costs_its_own_overlay_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also no thread that can be started, which is a RuntimeError."""
    paths = [tmp_path / "o" / f"{name}.qed" for name in "abc"]
    real = FileStorage.in_thread

    async def no_thread(self: FileStorage, function: Callable[[], object]) -> object:
        if self.path.endswith("b.qed"):
            raise RuntimeError("can't start new thread")
        return await real(self, function)

    async with empty_folder(tmp_path / "o") as registry:
        for path in paths:
            create(path)
        with monkeypatch.context() as patch:
            patch.setattr(FileStorage, "in_thread", no_thread)
            assert await registry.scan_if_changed()
            assert [served.image is not None for served in registry.everything()] == [True, False, True]
            assert str(registry.everything()[1].error) == "internal error, see the log"
        assert await registry.scan_if_changed(retry=True)
        assert all(served.image is not None for served in registry.everything())


@pytest.mark.expect_log("the stream has stopped: was cut")
async def test_a_failed_inspection_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server is away for a while; a file that was cut stays so."""
    monkeypatch.setattr("qedfs.mount.rounds.ROUND_SECONDS", 0.01)
    overlay = tmp_path / "o" / "new.qed"
    answers = [QedfsError("Stale file handle"), QedfsError("Stale file handle"), None, BadOverlay("was cut")]
    states: list[tuple[State, QedfsError | None]] = []
    failed = trio.Event()

    class WaitsForFailure(Driver):
        def changed(self, job: Job) -> None:
            if job.state is State.FAILED:
                failed.set()

    async def inspect(_: Overlay) -> None:
        (served,) = registry.everything()
        assert served.job is not None
        states.append((served.job.state, served.job.error))
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(Overlay, "inspect", inspect)
    async with empty_folder(overlay.parent) as registry:
        create(overlay)
        assert await registry.scan_if_changed()
        (served,) = registry.everything()
        assert served.job is not None
        served.job.attach(WaitsForFailure())
        await failed.wait()
        assert states == [(State.OFF, None)] * 4
        assert (served.job.state, str(served.job.error)) == (State.FAILED, "was cut")
        assert served.image is not None
        assert {str(trouble.error) for trouble in served.image.condition.troubles()} == {"was cut"}
        assert answers == []
