"""Local paths: what was judged is what is used, whatever is put there meanwhile, and a dead server stays alone."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from qedfs.errors import Refused
from qedfs.source.local import LocalSource
from qedfs.source.nbd import NbdSource
from qedfs.source.open import allowed, remote_source
from qedfs.source.path import THREADS, Held
from qedfs.source.policy import Policy
from qedfs.source.url import Location, parse_location
from tests.harness.hang import HANG_SECONDS

Listen = Callable[[Path], socket.socket]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that is allowed; what is beside it is not."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "base").write_bytes(b"harmless")
    return tmp_path / "allowed"


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy((str(folder),))


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Listens at a path, and never accepts."""
    made: list[socket.socket] = []

    def listens(path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        made.append(listener)
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen()
        return listener

    yield listens
    for listener in made:
        listener.close()


def file_at(path: Path) -> Location:
    return parse_location(str(path))


def socket_at(path: Path) -> Location:
    return parse_location(f"nbd+unix:///?socket={path}")


def replace_by_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def is_held(path: Path) -> bool:
    """Whether a descriptor of this process leads to it."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(entry.readlink()))
    return str(path) in links


async def test_a_link_is_judged_by_where_it_leads(folder: Path, policy: Policy) -> None:
    (folder / "inner").symlink_to(folder / "base")
    (folder / "outer").symlink_to(folder.parent / "secret")
    source = await LocalSource.open(file_at(folder / "inner"), policy)
    assert source.identity.size == len(b"harmless")
    await source.aclose()
    with pytest.raises(Refused, match="outside every"):
        await LocalSource.open(file_at(folder / "outer"), policy)


async def test_a_link_that_takes_the_files_place_behind_the_first_look(
    folder: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder / "base"

    async def look_and_swap(location: Location, policy: Policy) -> None:
        await allowed(location, policy)
        replace_by_link(base, folder.parent / "secret")

    monkeypatch.setattr("qedfs.source.open.allowed", look_and_swap)
    async with trio.open_nursery() as nursery:
        source = remote_source(file_at(base), policy, nursery)
        with pytest.raises(Refused, match="outside every"):
            await source.connect()


def test_what_was_found_is_kept_whatever_becomes_of_the_name(folder: Path, policy: Policy) -> None:
    base = folder / "base"
    with Held(file_at(base), policy) as held:
        replace_by_link(base, folder.parent / "secret")
        assert Path(held.path).read_bytes() == b"harmless"


def test_nothing_stays_held(folder: Path, policy: Policy) -> None:
    for path, error in ((folder.parent / "secret", Refused), (folder / "none", FileNotFoundError)):
        with pytest.raises(error):
            Held(file_at(path), policy)
        assert not is_held(path)
    held = Held(file_at(folder / "base"), policy)
    assert is_held(folder / "base")
    del held
    assert not is_held(folder / "base")


async def test_a_socket_is_judged_by_where_its_path_leads(folder: Path, policy: Policy, listen: Listen) -> None:
    outside = listen(folder.parent / "outside")
    (folder / "socket").symlink_to(folder.parent / "outside")
    async with trio.open_nursery() as nursery:
        with pytest.raises(Refused, match="outside every"):
            await NbdSource.open(socket_at(folder / "socket"), policy, nursery)
    with pytest.raises(BlockingIOError):
        outside.accept()


async def test_a_connection_goes_to_the_socket_that_was_judged(
    folder: Path, policy: Policy, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = listen(folder / "socket"), listen(folder.parent / "outside")
    check = Policy.check_path

    def check_and_swap(self: Policy, path: str, location: Location) -> None:
        check(self, path, location)
        replace_by_link(folder / "socket", folder.parent / "outside")

    monkeypatch.setattr(Policy, "check_path", check_and_swap)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(NbdSource.open, socket_at(folder / "socket"), policy, nursery)
        with trio.fail_after(HANG_SECONDS):
            await trio.lowlevel.wait_readable(inside)
        nursery.cancel_scope.cancel()  # nobody shakes hands
    inside.accept()[0].close()
    with pytest.raises(BlockingIOError):
        outside.accept()


class DeadServer:
    """What would wait for the disk under some paths waits until `revive`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: set[str] = set()
        self.waiting = 0
        self._alive = threading.Event()
        for name in ("pread", "open"):
            monkeypatch.setattr(os, name, self._stuck(getattr(os, name)))
        monkeypatch.setattr(os.path, "realpath", self._stuck(os.path.realpath))

    def _stuck(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(place: str | int, *args: Any, **options: Any) -> Any:
            if (os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)) in self.paths:
                self.waiting += 1
                self._alive.wait()
            return function(place, *args, **options)

        return call

    def revive(self) -> None:
        self._alive.set()


@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadServer]:
    server = DeadServer(monkeypatch)
    yield server
    server.revive()


async def read(source: LocalSource, size: int) -> bytes:
    buffer = bytearray(size)
    await source.read(0, memoryview(buffer))
    return bytes(buffer)


async def test_a_dead_file_server_takes_its_own_backing_only(
    folder: Path, policy: Policy, nursery: trio.Nursery, dead_server: DeadServer
) -> None:
    (folder / "dead").write_bytes(b"gone")
    healthy, dead = [await LocalSource.open(file_at(folder / name), policy) for name in ("base", "dead")]
    dead_server.paths.add(str(folder / "dead"))
    for _ in range(THREADS):
        nursery.start_soon(read, dead, 4)
        nursery.start_soon(allowed, file_at(folder / "dead"), policy)
    with trio.fail_after(HANG_SECONDS):
        while dead_server.waiting < THREADS:  # noqa: ASYNC110 - counted in threads
            await trio.sleep(0.001)
        assert await read(healthy, 8) == b"harmless"
        (folder / "later").write_bytes(b"later")
        await allowed(file_at(folder / "later"), policy)
        later = await LocalSource.open(file_at(folder / "later"), policy)
        assert await read(later, 5) == b"later"
    assert dead_server.waiting == THREADS
    nursery.cancel_scope.cancel()


async def test_an_opening_that_ends_behind_its_deadline_leaves_nothing_open(
    folder: Path, policy: Policy, dead_server: DeadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    base = (folder / "base").stat().st_ino

    def note(status: os.stat_result) -> None:
        # Threads that a test before this one has abandoned may come by as well.
        if status.st_ino == base:
            opened.set()

    monkeypatch.setattr("qedfs.source.local._modified", note)
    dead_server.paths.add(str(folder / "base"))
    with trio.move_on_after(0.01):
        await LocalSource.open(file_at(folder / "base"), policy)
    assert not opened.is_set()
    dead_server.revive()
    with trio.fail_after(HANG_SECONDS):
        while not opened.is_set() or is_held(folder / "base"):  # noqa: ASYNC110 - a thread's doing
            await trio.sleep(0.001)
