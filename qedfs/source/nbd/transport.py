"""The transport of an NBD connection: a TCP or Unix socket, in the clear or with TLS.

Owns sockets and addresses, and the TLS stream. Must not know what the bytes mean: received bytes go into the buffers
that the parser (`Replies`) supplies. Raises the errors of the operating system, of `ssl` and of trio; `errors.py`
translates them.

Without TLS, a system call is made at once, and the task waits only if the call would block. That saves a round of the
event loop per call, and it makes cancelling simple: no other task can withdraw a buffer between two awaits, so no byte
ever goes into a buffer whose reader has left.
"""

from __future__ import annotations

import socket
import ssl
from typing import Protocol

import trio

from qedfs.source.nbd.gathering import Gathering
from qedfs.source.nbd.reply import Replies
from qedfs.source.path import Held, in_thread
from qedfs.source.policy import Policy
from qedfs.source.resolver import addresses
from qedfs.source.url import Location

# After this many receives, or bytes, in a row without blocking, other tasks get their turn.
RECEIVES_PER_TURN = 16
BYTES_PER_TURN = 1024 * 1024
TLS_RECEIVE_SIZE = 256 * 1024


class Transport(Protocol):
    """A connected byte stream. Only one task receives, and one task at a time sends."""

    async def receive(self, replies: Replies) -> int:
        """Pass received bytes to the parser. Returns their number, 0 at the end of the stream. Safe to cancel."""
        ...

    async def receive_exactly(self, size: int) -> bytes:
        """Receive the next `size` bytes. Raises EOFError at the end of the stream."""
        ...

    async def send(self, data: bytes) -> None:
        """Send all of `data`. After a cancellation, a part may have been sent, so close the transport."""
        ...

    def close(self) -> None:
        """Close at once. Tasks that wait in another method get trio.ClosedResourceError."""
        ...


class PlainTransport:
    """A socket, used directly."""

    def __init__(self, raw: socket.socket, guarded: trio.socket.SocketType, gathering: Gathering) -> None:
        """`guarded` is trio's wrapper of `raw`. It owns the descriptor, and TLS uses it."""
        self._raw = raw
        self.socket = guarded
        self._receives_left = RECEIVES_PER_TURN
        self._bytes_left = BYTES_PER_TURN
        self._gathering = gathering

    async def receive(self, replies: Replies) -> int:
        gathered = False
        while True:
            try:
                count = self._raw.recvmsg_into(replies.buffers())[0]
            except BlockingIOError:
                if self._gathering.seconds and not gathered:
                    gathered = True
                    await self._gathering.pause()
                else:
                    gathered = False
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
    """A socket with TLS. Payload is copied once, from the TLS library's output.

    Nothing gathers here: trio's TLS stream receives by itself.
    """

    def __init__(self, plain: PlainTransport, context: ssl.SSLContext, host: str) -> None:
        self._socket = plain.socket
        # https_compatible: if the server just closes the connection, that is the end of the stream, not a TLS error. A
        # truncated reply is detected by its length anyway.
        self._stream = trio.SSLStream(
            trio.SocketStream(plain.socket), context, server_hostname=host, https_compatible=True
        )

    async def handshake(self) -> None:
        """Do the TLS handshake, which verifies the server's certificate and name."""
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


async def connect(location: Location, policy: Policy, gathering: Gathering, *, seconds: float) -> PlainTransport:
    """Connect to the server of `location` within `seconds`, trying its addresses in turn.

    Raises:
        Refused: `policy` does not allow an address of the server, or the socket that the path leads to.
        OSError, trio.TooSlowError: no address answered.
    """
    if location.path is not None:
        with trio.fail_after(seconds), await in_thread(location.path, lambda: Held(location, policy)) as held:
            return await _connect_to(socket.AF_UNIX, held.path, gathering)
    give_up_at = trio.current_time() + seconds
    with trio.fail_after(seconds):
        found = await addresses(location.host or "", location.port or 0)
    failure: Exception | None = None
    for tried, (family, address) in enumerate(found):
        policy.check_address(str(address[0]), location)
        # An address that swallows packets must leave time for the others.
        share = (give_up_at - trio.current_time()) / (len(found) - tried)
        try:
            with trio.fail_after(max(share, 0)):
                return await _connect_to(family, address, gathering)
        except (OSError, trio.TooSlowError) as exc:
            failure = exc
    raise failure or OSError("its name has no address")


async def _connect_to(family: int, address: object, gathering: Gathering) -> PlainTransport:
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
    return PlainTransport(raw, guarded, gathering)
