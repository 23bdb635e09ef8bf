"""Names that nobody answers for take no thread from others, in the whole program."""

from __future__ import annotations

import ast
import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import qedfs
from qedfs.errors import SourceUnreachable
from qedfs.source.nbd import NbdSource
from qedfs.source.policy import Policy
from qedfs.source.resolver import THREADS, addresses
from qedfs.source.url import parse_location
from tests.harness.hang import HANG_SECONDS

HEALTHY = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))]
NAMES = 100  # more than trio lets run by itself


class NameServer:
    """A resolver that knows `healthy`, and never answers for a name that begins with `silent`."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.open = threading.Event()
        self.all_asked = trio.Event()  # NAMES of them

    def getaddrinfo(self, host: str, *_: object, flags: int = 0, **__: object) -> list[object]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        self.asked[host] += 1
        if len(self.asked) == NAMES:
            trio.from_thread.run_sync(self.all_asked.set)
        if host.startswith("silent"):
            self.open.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return list(HEALTHY)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    found = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    yield found
    found.open.set()


async def test_a_name_is_found_while_others_are_not(names: NameServer) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(NAMES):
            nursery.start_soon(addresses, f"silent{number}", 9)
        with trio.fail_after(HANG_SECONDS):
            await names.all_asked.wait()
            assert await addresses("healthy", 9) == [(socket.AF_INET, ("127.0.0.1", 9))]
        nursery.cancel_scope.cancel()


async def test_look_ups_that_were_given_up_take_no_place_from_others(names: NameServer) -> None:
    for number in range(NAMES):
        with trio.move_on_after(0.01):
            await addresses(f"silent{number}", 9)
    with trio.fail_after(HANG_SECONDS):
        assert await addresses("healthy", 9)
        await trio.to_thread.run_sync(lambda: None)


async def test_one_name_takes_few_threads(names: NameServer) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(NAMES):
            nursery.start_soon(addresses, "silent", 9)
        with trio.fail_after(HANG_SECONDS):
            assert await addresses("healthy", 9)
            await trio.testing.wait_all_tasks_blocked(0.1)
        assert names.asked["silent"] <= THREADS
        nursery.cancel_scope.cancel()


async def test_without_a_thread_the_name_is_not_found_now(names: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("trio.to_thread.run_sync", refuse)
    with pytest.raises(OSError, match="temporarily unavailable"):
        await addresses("healthy", 9)


async def test_a_number_is_no_name() -> None:
    assert await addresses("127.0.0.1", 9) == [(socket.AF_INET, ("127.0.0.1", 9))]
    assert await addresses("::1", 9) == [(socket.AF_INET6, ("::1", 9, 0, 0))]


async def test_a_source_is_reached_while_names_of_others_are_not_found(names: NameServer) -> None:
    async def try_to_open(number: int) -> None:
        location = parse_location(f"nbd://silent{number}/")
        with contextlib.suppress(SourceUnreachable):
            await NbdSource.open(location, Policy(), nursery)

    async with trio.open_nursery() as nursery:
        for number in range(NAMES):
            nursery.start_soon(try_to_open, number)
        with trio.fail_after(HANG_SECONDS):
            await names.all_asked.wait()
            # Nobody listens there: the error of a connection shows that the name was found.
            with pytest.raises(SourceUnreachable, match="refused"):
                await NbdSource.open(parse_location("nbd://healthy:9/"), Policy(), nursery)
        nursery.cancel_scope.cancel()


def test_a_thread_that_may_be_given_up_has_a_limiter() -> None:
    """What runs under trio's own limiter has to end by itself; and only `resolver.py` asks for addresses."""
    wrong = []
    for path in sorted(Path(qedfs.__file__).parent.rglob("*.py")):
        text = path.read_text()
        if "to_thread.run_sync" not in text and "getaddrinfo" not in text:
            continue  # parsing all files takes most of a second
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            given_up = called.endswith("to_thread.run_sync") and "abandon_on_cancel" in keywords
            if (given_up and "limiter" not in keywords) or (
                called.endswith("getaddrinfo") and path.name != "resolver.py"
            ):
                wrong.append(f"{path.name}:{node.lineno}: {called}")
    assert not wrong, "\n".join(wrong)
