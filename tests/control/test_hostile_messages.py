"""A thousand bad messages at once: they cost bounded memory, leave nothing behind, and nobody else notices."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from qedfs.control.qmp.wire import MAX_MESSAGE_BYTES
from tests.harness.hang import HANG_SECONDS
from tests.harness.sample import sample

from .support import FakeMount, MemorySource, Talk, controlled, talking

# Thousands of rounds through code that other tests cover: a tracer would double their time.
pytestmark = [pytest.mark.sweep, pytest.mark.no_cover]

MESSAGES = sample(250, whole=1000)
CLIENTS = 8
PIECE = b"x" * 65536
ENDLESS_PIECES = 1024  # 64 MiB; kept, those of two clients alone would show
MOST_GROWTH = 32 << 20  # bytes; the server may hold a message of the largest size for each client

# What one message is made of; pieces, so that a large one takes no memory of ours.
Message = Iterator[bytes]


def _garbage(chance: random.Random) -> Message:
    yield chance.randbytes(chance.randrange(1, 200))


def _long_id(chance: random.Random) -> Message:
    yield b'{"execute": "query-version", "id": "' + b"x" * chance.randrange(200_000) + b'"}'


def _half(_: random.Random) -> Message:
    yield b'{"execute": "query-jobs"'


def _deep(chance: random.Random) -> Message:
    yield b'{"execute": "block-stream", "arguments": {"device": ' + b"[" * chance.randrange(300)


def _several(chance: random.Random) -> Message:
    yield b'{"execute": "x-qedfs-status"}' * chance.randrange(1, 5)


def _no_text(_: random.Random) -> Message:
    yield b'{"execute": "job-cancel", "arguments": {"id": "\xff\xfe"}}'


def _no_number(_: random.Random) -> Message:
    yield b'{"execute": "block-stream", "arguments": {"device": "disk", "speed": 1e999}}'


def _quotes(chance: random.Random) -> Message:
    yield b'"' * chance.randrange(10) + b"\n"


def _in_crumbs(_: random.Random) -> Message:
    for byte in b'{"execute": "no-such-thing", "arguments": {"a": [1, 2, "x"]}}':
        yield bytes([byte])


def _oversized(chance: random.Random) -> Message:
    yield b'{"execute": "query-version", "id": "'
    for _ in range(MAX_MESSAGE_BYTES // len(PIECE) + chance.randrange(20)):
        yield PIECE
    yield b'"}'


def _endless() -> Message:
    yield b'{"execute": "'
    for _ in range(ENDLESS_PIECES):
        yield PIECE


KINDS = [_garbage, _long_id, _half, _deep, _several, _no_text, _no_number, _quotes, _in_crumbs, _oversized]


class Client:
    """One bad client, that comes back as soon as it has hung up."""

    def __init__(self, path: Path, seed: int) -> None:
        self.read_by_server = 0  # messages on connections that the server has read to their end
        self._path = path
        self._chance = random.Random(seed)

    async def run(self, messages: int) -> None:
        while self.read_by_server < messages:
            async with await trio.open_unix_socket(str(self._path)) as stream:
                if self._chance.random() < 0.8:
                    await stream.send_all(b'{"execute":"qmp_capabilities"}')
                if self._chance.random() < 0.2:
                    await self._hang_up_on(stream)
                else:
                    self.read_by_server += await self._converse(stream, self._chance.randrange(1, 50))

    async def be_endless(self) -> None:
        async with await trio.open_unix_socket(str(self._path)) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(_drink, stream)
            for piece in _endless():
                await stream.send_all(piece)
            await stream.send_eof()

    async def _converse(self, stream: trio.SocketStream, messages: int) -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drink, stream)
            for _ in range(messages):
                for piece in self._chance.choice(KINDS)(self._chance):
                    await stream.send_all(piece)
            await stream.send_eof()
        return messages

    async def _hang_up_on(self, stream: trio.SocketStream) -> None:
        """Without reading an answer, in the midst of a message."""
        for make in (_several, _half):
            for piece in make(self._chance):
                await stream.send_all(piece)


async def _drink(stream: trio.SocketStream) -> None:
    """Read until the server, which has answered all that it was sent, hangs up."""
    while await stream.receive_some(65536):
        pass


async def _ask_on(path: Path, asked: list[int]) -> None:
    """A good client, whose answers have to be right all the time."""
    async with talking(path) as talk:
        right = await talk.get("query-version")
        (image,) = (await talk.get("x-qedfs-status"))["images"]
        while True:
            ident = len(asked)
            await talk.send(f'{{"execute": "query-version", "id": {ident}}}')
            assert await talk.reply() == {"return": right, "id": ident}
            assert (await talk.get("x-qedfs-status"))["images"] == [image]
            assert await talk.get("query-block-jobs") == []
            assert (await talk.error("job-cancel", id="disk"))[1] == "Job not found"
            asked.append(ident)


async def _attack(path: Path, clients: list[Client]) -> None:
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.run, -(-MESSAGES // CLIENTS))
        for client in clients[:2]:
            nursery.start_soon(client.be_endless)


async def test_bad_messages_harm_nobody(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (mount, path):
        await mount.add("disk", MemorySource(bytes(65536)))
        clients = [Client(path, seed) for seed in range(CLIENTS)]
        asked: list[int] = []
        await _one_answer(path)
        tasks = trio.lowlevel.current_statistics().tasks_living
        before = _start_of_peak()
        with trio.fail_after(HANG_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ask_on, path, asked)
                await _attack(path, clients)
                nursery.cancel_scope.cancel()
        assert sum(client.read_by_server for client in clients) >= MESSAGES
        assert len(asked) >= 10
        assert _kib("VmHWM") - before < MOST_GROWTH >> 10
        await _all_gone(path, tasks)
        assert not mount.has_quit.is_set()
        _unharmed(mount)


def _unharmed(mount: FakeMount) -> None:
    (served,) = mount.served
    assert served.job is not None
    assert not served.job.enabled
    assert served.image is not None
    assert served.image.populated == 0


async def _one_answer(path: Path) -> None:
    async with talking(path) as talk:
        await talk.get("x-qedfs-status")


async def _all_gone(path: Path, tasks: int) -> None:
    """Wait until the server has no more tasks than before, and answers."""
    with trio.fail_after(HANG_SECONDS):
        while trio.lowlevel.current_statistics().tasks_living > tasks:
            await trio.testing.wait_all_tasks_blocked(0.01)
    await _one_answer(path)


def _start_of_peak() -> int:
    """KiB of memory now; from here on the kernel keeps the peak of it (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kib("VmRSS")


def _kib(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
async def test_each_kind_of_bad_message_costs_its_own_connection_at_most(
    tmp_path: Path, make: Callable[[random.Random], Message]
) -> None:
    async with controlled(tmp_path) as (mount, path), talking(path) as talk:
        await mount.add("disk", MemorySource(bytes(65536)))
        async with await trio.open_unix_socket(str(path)) as bad:
            await bad.send_all(b'{"execute":"qmp_capabilities"}')
            for piece in make(random.Random(1)):
                await bad.send_all(piece)
            # The byte that throws away what is half received, and a good message.
            await bad.send_all(b'\xff\n{"execute": "query-name", "id": "last"}')
            last = await _answer(Talk(bad), "last")
            assert last["return"] == {"name": mount.mountpoint}
        assert len((await talk.get("x-qedfs-status"))["images"]) == 1


async def _answer(talk: Talk, ident: str) -> dict[str, object]:
    while (message := await talk.line()).get("id") != ident:
        pass
    return message
