"""A scripted NBD server on trio: serves bytes correctly, or misbehaves in one way chosen by name.

Written against the NBD protocol specification, not against the client under test, with which it shares no code. What
it can do wrong is in `nbd_behaviours`. As a process of its own:

    python -m tests.fakes.nbd_server --file F [--port P | --unix PATH] [--behaviour NAME] [--list]
"""

from __future__ import annotations

import argparse
import dataclasses
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import trio

GREETING = b"NBDMAGIC" + b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

OPTION_ABORT, OPTION_STARTTLS, OPTION_GO, OPTION_STRUCTURED, OPTION_META = 2, 5, 7, 8, 10
ACK, INFO, META_CONTEXT = 1, 3, 4
UNSUPPORTED, POLICY, TLS_REQUIRED, UNKNOWN, SHUTDOWN = (2**31 + n for n in (1, 2, 5, 6, 7))
READ, DISC, STATUS = 0, 2, 7
NONE, DATA, HOLE, EXTENTS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 2**15 + 1, 2**15 + 2
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108

CONTEXT_ID = 7
ZERO_GRAIN = 4096  # extents are found in steps of this many bytes


def option_reply(option: int, kind: int, body: bytes = b"", *, magic: int = OPTION_REPLY_MAGIC) -> bytes:
    return struct.pack(">QIII", magic, option, kind, len(body)) + body


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", SIMPLE_MAGIC, error, cookie) + data


def chunk(kind: int, cookie: int, body: bytes = b"", *, done: bool = True, size: int | None = None) -> bytes:
    """A structured reply chunk; `size` is a lie about the length of the body."""
    return struct.pack(">IHHQI", STRUCTURED_MAGIC, done, kind, cookie, len(body) if size is None else size) + body


def data_chunk(cookie: int, pos: int, data: bytes, *, done: bool = True) -> bytes:
    return chunk(DATA, cookie, struct.pack(">Q", pos) + data, done=done)


def hole_chunk(cookie: int, pos: int, size: int, *, done: bool = True) -> bytes:
    return chunk(HOLE, cookie, struct.pack(">QI", pos, size), done=done)


def error_chunk(cookie: int, error: int, text: bytes = b"", *, done: bool = True) -> bytes:
    return chunk(ERROR, cookie, struct.pack(">IH", error, len(text)) + text, done=done)


def status_chunk(cookie: int, extents: list[tuple[int, int]], *, context: int = CONTEXT_ID, done: bool = True) -> bytes:
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(EXTENTS, cookie, body, done=done)


@dataclasses.dataclass(frozen=True)
class Call:
    """One request as the server reads it; `data` is what a correct answer to a read holds."""

    command: int
    cookie: int
    pos: int
    size: int
    data: bytes


Reply = Callable[[Call], bytes]


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How one server differs from a correct one. A hook that is None leaves the correct behaviour."""

    at: str = "never"  # where a client must notice: "open", "read", "extents", or "never"
    says: str = ""  # a part of what it should say
    permanent: bool = False  # whether asking again is useless
    greeting: bytes | None = None
    options: dict[int, bytes] = dataclasses.field(default_factory=dict)  # whole answers, by option
    size: int | None = None  # announced
    flags: int = 1
    blocks: tuple[int, int, int] | None = None  # minimum, preferred, maximum
    structured: bool = True
    read: Reply | None = None
    status: Reply | None = None
    silent: bool = False  # reads the requests and answers none
    hangs_up: bool = False  # after the first scripted greeting, option or reply
    deaf: bool = False  # accepts connections, and that is all
    first_connections_only: int = 1000  # later ones meet a deaf server


CORRECT = Behaviour()


class FakeNbd:
    """One export. `options`, `calls`, `connections` tell what clients did; `content`, `behaviour` may be exchanged."""

    def __init__(self, content: bytes, behaviour: Behaviour = CORRECT, *, export: str = "") -> None:
        self.content = content
        self.behaviour = behaviour
        self.export = export
        self.options: list[int] = []
        self.calls: list[Call] = []
        self.connections = 0
        self.before_answer: Callable[[Call], Awaitable[None]] | None = None
        self.streams: set[trio.SocketStream] = set()

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one client until it goes; what a client does never ends the server."""
        self.connections += 1
        self.streams.add(stream)
        try:
            if self.behaviour.deaf or self.connections > self.behaviour.first_connections_only:
                await trio.sleep_forever()
            if await self._shake_hands(stream):
                await self._transmit(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            pass
        finally:
            self.streams.discard(stream)
            stream.socket.close()

    def hang_up(self) -> None:
        """Close all connections, as if the server had died."""
        for stream in self.streams:
            stream.socket.close()

    async def _shake_hands(self, stream: trio.SocketStream) -> bool:
        greeting = self.behaviour.greeting
        await stream.send_all(GREETING + struct.pack(">H", 3) if greeting is None else greeting)
        if greeting is not None and self.behaviour.hangs_up:
            return False
        await _exactly(stream, 4)
        while True:
            _, option, size = struct.unpack(">8sII", await _exactly(stream, 16))
            body = await _exactly(stream, size)
            scripted = self.behaviour.options.get(option)
            self.options.append(option)
            if option == OPTION_ABORT:
                return False
            if scripted is not None:
                await stream.send_all(scripted)
                if self.behaviour.hangs_up:
                    return False
                continue
            answer, over = self._answer_option(option, body)
            await stream.send_all(answer)
            if over:
                return True

    def _answer_option(self, option: int, body: bytes) -> tuple[bytes, bool]:
        if option == OPTION_STRUCTURED and self.behaviour.structured:
            return option_reply(option, ACK), False
        if option == OPTION_META and self.behaviour.structured:
            context = option_reply(option, META_CONTEXT, struct.pack(">I", CONTEXT_ID) + b"base:allocation")
            return context + option_reply(option, ACK), False
        if option != OPTION_GO:
            return option_reply(option, UNSUPPORTED), False
        name_size = int.from_bytes(body[:4], "big")
        if body[4 : 4 + name_size].decode() != self.export:
            return option_reply(option, UNKNOWN, b"no such export"), False
        size = len(self.content) if self.behaviour.size is None else self.behaviour.size
        answer = option_reply(option, INFO, struct.pack(">HQH", 0, size, self.behaviour.flags))
        if self.behaviour.blocks is not None:
            answer += option_reply(option, INFO, struct.pack(">HIII", 3, *self.behaviour.blocks))
        return answer + option_reply(option, ACK), True

    async def _transmit(self, stream: trio.SocketStream) -> None:
        while True:
            magic, _, command, cookie, pos, size = struct.unpack(">IHHQQI", await _exactly(stream, 28))
            if magic != REQUEST_MAGIC or command == DISC:
                return
            call = Call(command, cookie, pos, size, self.content[pos : pos + size])
            self.calls.append(call)
            if self.before_answer is not None:
                await self.before_answer(call)
            if self.behaviour.silent:
                continue
            hook = self.behaviour.read if command == READ else self.behaviour.status
            await stream.send_all((hook or self.answer)(call))
            if hook is not None and self.behaviour.hangs_up:
                return

    def answer(self, call: Call) -> bytes:
        """The correct answer to a request."""
        if not call.size or call.pos + call.size > len(self.content):
            return error_chunk(call.cookie, EINVAL) if self.behaviour.structured else simple(call.cookie, EINVAL)
        if call.command == STATUS and self.behaviour.structured:
            return status_chunk(call.cookie, list(_zeros(call.pos, call.data)))
        if call.command != READ:
            return simple(call.cookie, ENOTSUP)
        if self.behaviour.structured:
            return data_chunk(call.cookie, call.pos, call.data)
        return simple(call.cookie, 0, call.data)


def _zeros(pos: int, data: bytes) -> Iterator[tuple[int, int]]:
    """Runs of grains as base:allocation describes them: 3 is a hole that reads as zeros."""
    run, state, at = 0, 0, 0
    while at < len(data):
        grain = data[at : at + ZERO_GRAIN - (pos + at) % ZERO_GRAIN]
        at += len(grain)
        now = 0 if any(grain) else 3
        if run and now != state:
            yield run, state
            run = 0
        run, state = run + len(grain), now
    yield run, state


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = await stream.receive_some(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


async def listen_unix(path: str) -> trio.SocketListener:
    """A listener at a Unix socket, which trio has no function for; nothing may be at `path`."""
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen(64)
    return trio.SocketListener(listener)


async def _main(arguments: argparse.Namespace, fake: FakeNbd) -> None:
    if arguments.unix is not None:
        listeners = [await listen_unix(arguments.unix)]
        print(f"nbd+unix:///{arguments.export}?socket={arguments.unix}", flush=True)
    else:
        listeners = list(await trio.open_tcp_listeners(arguments.port, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        print(f"nbd://127.0.0.1:{port}/{arguments.export}", flush=True)
    await trio.serve_listeners(fake.handle, listeners)


def main() -> None:
    """Serve a file until the process is ended; prints the URL once clients may come."""
    from tests.fakes.nbd_behaviours import BEHAVIOURS

    parser = argparse.ArgumentParser(description="an NBD server that misbehaves on request")
    parser.add_argument("--file", help="what it serves")
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1; 0 takes a free one")
    parser.add_argument("--unix", help="the path of a Unix socket, instead of a port")
    parser.add_argument("--export", default="")
    parser.add_argument("--behaviour", choices=sorted(BEHAVIOURS), default="correct")
    parser.add_argument("--list", action="store_true", help="print the names of the behaviours and exit")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(BEHAVIOURS))
    elif arguments.file is None:
        parser.error("--file is missing")
    else:
        content = Path(arguments.file).read_bytes()
        trio.run(_main, arguments, FakeNbd(content, BEHAVIOURS[arguments.behaviour], export=arguments.export))


if __name__ == "__main__":
    main()
