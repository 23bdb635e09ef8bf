"""Between the look at a path and its use somebody puts another thing there: what was judged is what is used."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from qedfs.errors import Refused
from qedfs.source.local import LocalSource
from qedfs.source.nbd import NbdSource
from qedfs.source.open import allowed, remote_source
from qedfs.source.path import Held
from qedfs.source.policy import Policy
from qedfs.source.url import Location, parse_location

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
    with trio.move_on_after(0.05):  # nobody shakes hands
        async with trio.open_nursery() as nursery:
            await NbdSource.open(socket_at(folder / "socket"), policy, nursery)
    inside.accept()[0].close()
    with pytest.raises(BlockingIOError):
        outside.accept()
