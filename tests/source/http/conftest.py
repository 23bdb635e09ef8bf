"""A server with known content, and sources that end with the test."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest
import trio

from qedfs.source.http import HttpSource
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location
from tests.fakes.http_server import FakeHttpServer
from tests.harness.hang import HANG_SECONDS

CONTENT = random.Random(1).randbytes(1_000_003)

OpenSource = Callable[..., Awaitable[HttpSource]]


@pytest.fixture
def server() -> Iterator[FakeHttpServer]:
    with FakeHttpServer(CONTENT) as running:
        yield running


@pytest.fixture
def other_server() -> Iterator[FakeHttpServer]:
    with FakeHttpServer(CONTENT) as running:
        yield running


@pytest.fixture
async def open_source(nursery: trio.Nursery) -> OpenSource:
    """Opens a URL; what it opens is closed with the test."""

    async def opens(url: str, *, policy: Policy | None = None, headers: Sequence[str] = ()) -> HttpSource:
        return await HttpSource.open(parse_location(url), policy or Policy(), nursery, headers=headers)

    return opens


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in the server's threads, which set no trio.Event."""
    with trio.fail_after(HANG_SECONDS):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


class Turns(trio.abc.Instrument):
    """How often the event loop has come back from its wait."""

    def __init__(self) -> None:
        self.count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


@contextlib.contextmanager
def turns() -> Iterator[Turns]:
    """The turns of the block."""
    counted = Turns()
    trio.lowlevel.add_instrument(counted)
    try:
        yield counted
    finally:
        trio.lowlevel.remove_instrument(counted)


async def read(source: HttpSource, pos: int, size: int, *, urgent: bool = False) -> bytes:
    buffer = bytearray(size)
    await source.read(pos, memoryview(buffer), urgent=urgent)
    return bytes(buffer)
