"""How bytes get to an NBD server and back: a TCP or Unix socket, in the clear or under TLS.

Owns sockets, addresses and certificates. Must not know what the bytes mean: received bytes go where the parser
(`Replies`) wants them. Errors are those of the operating system, of `ssl` and of trio; `faults` translates them.

In the clear, system calls are made on the spot and trio is asked to wait only when one would block. That saves a
turn of the event loop for each, and it is what makes cancelling simple: between two awaits nobody can take a buffer
away, so no byte ever goes to a buffer whose owner has left.
"""

from __future__ import annotations

import socket
import ssl
from typing import Protocol

import trio

from qedfs.source.nbd.reply import Replies
from qedfs.source.path import Held, in_thread
from qedfs.source.policy import Policy
from qedfs.source.resolver import addresses
from qedfs.source.url import Location

# The event loop gets its turn after this many receives in a row that did not block: about 1 MiB, or 16 small replies.
RECEIVES_PER_TURN = 16
BYTES_PER_TURN = 1024 * 1024
TLS_RECEIVE_SIZE = 256 * 1024


class Transport(Protocol):
    """A connected byte stream. One task receives, one task at a time sends."""

    async def receive(self, replies: Replies) -> int:
        """Hand the parser what has arrived, and return how many bytes; 0 at the end. Safe to cancel."""
        ...

    async def receive_exactly(self, size: int) -> bytes:
        """Return the next `size` bytes; raises EOFError at the end of the stream."""
        ...

    async def send(self, data: bytes) -> None:
        """Send all of `data`. After a cancellation nothing is known about what was sent: close."""
        ...

    def close(self) -> None:
        """Close at once; whoever waits in another method gets trio.ClosedResourceError."""
        ...


class PlainTransport:
    """A socket, used directly."""

    def __init__(self, raw: socket.socket, guarded: trio.socket.SocketType) -> None:
        """`guarded` is trio's wrapper of `raw`: it owns the descriptor, and TLS goes through it."""
        self._raw = raw
        self.socket = guarded
        self._receives_left = RECEIVES_PER_TURN
        self._bytes_left = BYTES_PER_TURN

    async def receive(self, replies: Replies) -> int:
        while True:
            try:
                count = self._raw.recvmsg_into(replies.buffers())[0]
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._raw)
                self._receives_left, self._bytes_left = RECEIVES_PER_TURN, BYTES_PER_TURN
                continue
            if count:
                replies.received(count)
                await self._give_way(count)
            return count

    async def receive_exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = await self.socket.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._raw.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._raw)

    def close(self) -> None:
        self.socket.close()

    async def _give_way(self, count: int) -> None:
        self._receives_left -= 1
        self._bytes_left -= count
        if self._receives_left <= 0 or self._bytes_left <= 0:
            self._receives_left, self._bytes_left = RECEIVES_PER_TURN, BYTES_PER_TURN
            await trio.lowlevel.checkpoint()


class TlsTransport:
    """The same under TLS; payload is copied once, out of what the TLS library decrypted."""

    def __init__(self, plain: PlainTransport, context: ssl.SSLContext, host: str) -> None:
        self._socket = plain.socket
        # https_compatible: a server that just closes the connection is the end of the stream, not a fault of TLS.
        # Cutting a reply short is noticed by its length anyway.
        self._stream = trio.SSLStream(
            trio.SocketStream(plain.socket), context, server_hostname=host, https_compatible=True
        )

    async def handshake(self) -> None:
        """Agree on keys and verify the server's certificate and name."""
        await self._stream.do_handshake()

    async def receive(self, replies: Replies) -> int:
        data = await self._stream.receive_some(TLS_RECEIVE_SIZE)
        replies.feed(data)
        return len(data)

    async def receive_exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = await self._stream.receive_some(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    def close(self) -> None:
        self._socket.close()


async def connect(location: Location, policy: Policy, *, seconds: float) -> PlainTransport:
    """Connect to the server of `location` within `seconds`, trying its addresses in turn.

    Raises:
        Refused: `policy` does not allow an address of the server, or the socket that the path leads to.
        OSError, trio.TooSlowError: no address answered.
    """
    if location.path is not None:
        with trio.fail_after(seconds), await in_thread(location.path, lambda: Held(location, policy)) as held:
            return await _connect_to(socket.AF_UNIX, held.path)
    give_up_at = trio.current_time() + seconds
    with trio.fail_after(seconds):
        found = await addresses(location.host or "", location.port or 0)
    failure: Exception | None = None
    for tried, (family, address) in enumerate(found):
        policy.check_address(str(address[0]), location)
        # A black hole at the first address must leave time for the others.
        share = (give_up_at - trio.current_time()) / (len(found) - tried)
        try:
            with trio.fail_after(max(share, 0)):
                return await _connect_to(family, address)
        except (OSError, trio.TooSlowError) as exc:
            failure = exc
    raise failure or OSError("its name has no address")


async def _connect_to(family: int, address: object) -> PlainTransport:
    raw = socket.socket(family, socket.SOCK_STREAM)
    guarded = trio.socket.from_stdlib_socket(raw)
    try:
        if family != socket.AF_UNIX:
            guarded.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            guarded.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await guarded.connect(address)
    except BaseException:
        guarded.close()
        raise
    return PlainTransport(raw, guarded)
