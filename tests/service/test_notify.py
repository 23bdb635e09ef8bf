"""What the service manager is told (sd_notify(3)), over a real socket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from qedfs.errors import BadOverlay
from qedfs.jobs.state import State
from qedfs.mount.notify import Notifier, status_line
from tests.harness.mounts import mounted, qedfs
from tests.mount.support import MIB, create, mounted_over, origin

from .support import Listener, listener


@pytest.fixture
def manager() -> Iterator[Listener]:
    with listener() as found:
        yield found


def test_ready_status_and_stopping_of_a_mount(tmp_path: Path, manager: Listener) -> None:
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        with mounted(overlay, tmp_path / "mnt", "--no-stream", env={"NOTIFY_SOCKET": manager.address}) as mount:
            manager.wait_for("READY=1")
            assert mount.path("disk.raw").exists()
            assert manager.wait_for("STATUS=") == "STATUS=0 of 1 images complete, 0% local"
            assert mount.unmount() == 0
    manager.wait_for("STOPPING=1")
    assert [line for line in manager.collect() if line in ("READY=1", "STOPPING=1")] == ["READY=1", "STOPPING=1"]
    assert "WATCHDOG=1" not in manager.lines


def test_no_ready_from_a_mount_that_fails(tmp_path: Path, manager: Listener) -> None:
    (tmp_path / "disk.qed").write_bytes(b"no overlay" * 100)
    (tmp_path / "mnt").mkdir()
    env = {"NOTIFY_SOCKET": manager.address}
    done = qedfs("mount", tmp_path / "disk.qed", tmp_path / "mnt", check=False, env=env)
    assert done.returncode == 3
    assert manager.collect() == []


def test_the_watchdog_is_fed_at_twice_the_rate(tmp_path: Path, manager: Listener) -> None:
    with origin(tmp_path, 4 * MIB) as source:
        overlay = create(tmp_path / "disk.qed", source.url)
        env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
        with mounted(overlay, tmp_path / "mnt", "--no-stream", env=env):
            manager.wait_for("WATCHDOG=1", count=5)


async def test_watchdog_interval(manager: Listener, autojump_clock: trio.testing.MockClock) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "30000000"})
    with trio.move_on_after(61):
        await notifier.watchdog()
    assert manager.collect() == ["WATCHDOG=1"] * 5  # at 0, 15, 30, 45, 60 s


@pytest.mark.parametrize(
    "extra",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"}],
)
async def test_nobody_watches(manager: Listener, extra: dict[str, str]) -> None:
    await Notifier({"NOTIFY_SOCKET": manager.address, **extra}).watchdog()
    assert manager.collect() == []


async def test_the_watched_process_is_named(manager: Listener, autojump_clock: trio.testing.MockClock) -> None:
    watched = {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}
    with trio.move_on_after(0.5):
        await Notifier({"NOTIFY_SOCKET": manager.address, **watched}).watchdog()
    assert manager.collect() == ["WATCHDOG=1"]


async def test_status_is_sent_when_it_changes(manager: Listener, autojump_clock: trio.testing.MockClock) -> None:
    images = [_image(0)]
    with trio.move_on_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Notifier({"NOTIFY_SOCKET": manager.address}).tell_status, lambda: images)
            await trio.sleep(12)
            images[0] = _image(50)
    assert manager.collect() == [f"STATUS=0 of 1 images complete, {percent}% local" for percent in (0, 50)]


def test_an_abstract_socket() -> None:
    manager = Listener(f"@qedfs-test-{os.getpid()}")
    try:
        Notifier({"NOTIFY_SOCKET": manager.address}).ready()
        assert manager.collect() == ["READY=1"]
    finally:
        manager.close()


@pytest.mark.parametrize("address", ["", "/nonexistent/notify", "vsock:2:1234", "relative"])
def test_a_socket_that_cannot_be_used_costs_nothing(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address}).ready()
    Notifier({}).ready()


def test_the_status_line() -> None:
    broken = SimpleNamespace(job=None, error=BadOverlay("no overlay"))
    settling = SimpleNamespace(job=None, error=None)
    assert status_line([]) == "0 of 0 images complete, 100% local"
    assert status_line([_image(100, State.COMPLETE), _image(99), broken, settling]) == (
        "1 of 4 images complete, 99% local, 1 not served"
    )


def test_nothing_is_sent_without_a_manager(tmp_path: Path) -> None:
    with origin(tmp_path, 4 * MIB) as source, mounted_over(tmp_path, source.url, "--verbose") as mount:
        assert mount.unmount() == 0
        assert "service manager" not in mount.output()


def _image(progress: int, state: State = State.RUNNING) -> SimpleNamespace:
    return SimpleNamespace(job=SimpleNamespace(total=100, progress=progress, state=state))
