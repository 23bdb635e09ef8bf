"""What the NBD tests share: a fake server in the test's own event loop, and an open source beside it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from qedfs.source.nbd.client import NbdSource
from qedfs.source.policy import Policy
from qedfs.source.samples import Samples
from qedfs.source.url import parse_location
from tests.fakes.nbd_server import FakeNbd

MiB = 1024 * 1024
ANY_SOCKET = Policy(("/",))


def sparse_content(size: int, *, seed: int = 1) -> bytes:
    """Random bytes with zeros from 1 MiB up to 3 MiB: a hole that every server can describe."""
    content = bytearray(random.Random(seed).randbytes(size))
    content[MiB : 3 * MiB] = bytes(len(content[MiB : 3 * MiB]))
    return bytes(content)


@asynccontextmanager
async def serving(fake: FakeNbd) -> AsyncIterator[str]:
    """Run `fake` at a free port of 127.0.0.1; yields its URL. All its connections are cut at the end."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with _running(fake, *listeners):
        yield f"nbd://127.0.0.1:{listeners[0].socket.getsockname()[1]}/{fake.export}"


@asynccontextmanager
async def serving_on_mock_clock(fake: FakeNbd) -> AsyncIterator[str]:
    """As `serving`, at a Unix socket: what is sent there has arrived, so that whoever waits then waits for time.

    The mock clock jumps while all tasks wait, and bytes may still be on their way through the loopback.
    """
    with tempfile.TemporaryDirectory(prefix="qedfs-") as folder:
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(f"{folder}/socket")
        listening.listen()
        async with _running(fake, trio.SocketListener(listening)):
            yield f"nbd+unix:///{fake.export}?socket={folder}/socket"


@asynccontextmanager
async def _running(fake: FakeNbd, *listeners: trio.SocketListener) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, fake.handle, [*listeners])
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened(url: str, samples: Samples | None = None) -> AsyncIterator[NbdSource]:
    """Open the source at `url`. That its nursery ends after `aclose` is part of what every test asserts."""
    async with trio.open_nursery() as nursery:
        try:
            source = await NbdSource.open(parse_location(url), ANY_SOCKET, nursery, samples=samples)
        except BaseException:
            nursery.cancel_scope.cancel()
            raise
        try:
            yield source
        finally:
            await source.aclose()


async def read(source: NbdSource, pos: int, size: int, *, urgent: bool = False) -> bytes:
    """The bytes of a range."""
    buffer = bytearray(size)
    await source.read(pos, memoryview(buffer), urgent=urgent)
    return bytes(buffer)
