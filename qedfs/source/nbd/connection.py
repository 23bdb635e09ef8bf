"""One connection to an NBD server: many requests in flight, matched to their replies by cookie.

Owns the life of the connection from connect to drop, and who waits for which reply. Must not know other
connections, nor what happens after a drop.

Tasks and shared state. `_listen` runs in the nursery given to `open` and is the only one that receives. Any
number of tasks call `read` and `extents`; `_sending` orders their requests on the wire, and a request is in the
parser's `in_flight` before its first byte leaves. `drop` may be called by anybody at any time: it does not await, and
after it `broken` says why, the socket is closed, and every request that was in flight has been woken as failed.
Between a look at `broken` and the request's entry into `in_flight` there must be no await, or a request could wait for
a reply on a dead connection for ever.

Cancellation. A reader that is cancelled while it waits leaves at once: its buffer is taken out of the parser, which
puts the rest of the reply into a bin, and the others go on. If the connection has brought nothing since that request
was sent, and that is not just now, it is dropped too: the deadline of the reader is how one learns that a server is
gone. A reader that is cancelled while a part of its request is sent drops the connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import ssl

import trio

from qedfs.errors import QedfsError, Reason, SourceUnreachable
from qedfs.source.nbd import errors
from qedfs.source.nbd.errors import EndedUnderTls
from qedfs.source.nbd.handshake import negotiate
from qedfs.source.nbd.protocol import (
    MAX_MINIMUM_BLOCK_SIZE,
    ErrorCode,
    Negotiated,
    Refusal,
    RequestType,
    Violation,
    encode_request,
)
from qedfs.source.nbd.reply import Replies, Request
from qedfs.source.nbd.transport import PlainTransport, TlsTransport, Transport, connect
from qedfs.source.policy import Policy
from qedfs.source.url import Location

CONNECT_SECONDS = 10.0  # for name, connect, TLS and NBD handshake together
# With requests in flight a reply must end, or PROGRESS_SIZE bytes arrive, in this time, or the connection is dropped.
STALL_SECONDS = 30.0
PROGRESS_SIZE = 64 * 1024
# A reply of which nothing has come in that time is taken for lost when so many later requests have been answered: this
# number, and so many times those in flight (a server may answer in any order, and on a slow link some wait for long).
LOST_OVERTAKEN = 8
LOST_ROUNDS = 4
# A reader that gives up sooner than this proves nothing about the server.
HASTE_SECONDS = 1.0
PARTS_PER_TURN = 64  # requests that one read sends before the event loop gets its turn
FAREWELL_SECONDS = 0.2
MAX_STATUS_RANGE = 2**31  # bytes per BLOCK_STATUS; the field would take 2^32-1


@dataclasses.dataclass(slots=True)
class _Waiting:
    request: Request
    answered: trio.Event
    sent_at: float


class Connection:
    """A connection in the transmission phase. `broken` is None, or why it was dropped."""

    def __init__(self, location: Location, transport: Transport, negotiated: Negotiated) -> None:
        self.negotiated = negotiated
        self.broken: str | None = None
        self.received = 0  # bytes, those of replies under way included
        self._broken_by = Reason.CUT
        self._location = location
        self._transport = transport
        self._replies = Replies(structured=negotiated.structured, context=negotiated.context)
        self._sending = trio.Lock()
        self._next_cookie = 1
        self._breaker = trio.CancelScope()
        self._progress_at = 0.0
        self._oldest = (0, 0.0)  # cookie of the oldest request, and when it was first seen to be that

    @classmethod
    async def open(
        cls, location: Location, policy: Policy, tls: ssl.SSLContext | None, nursery: trio.Nursery
    ) -> Connection:
        """Connect and shake hands. Raises Refused, SourceError or SourceUnreachable; nothing stays open then."""
        transport: Transport | None = None
        try:
            give_up_at = trio.current_time() + CONNECT_SECONDS
            transport = await connect(location, policy, seconds=CONNECT_SECONDS)
            with trio.fail_at(give_up_at):
                transport, negotiated = await _shake_hands(transport, location, tls)
        except BaseException as exc:
            if transport is not None:
                transport.close()
            if isinstance(exc, Exception) and not isinstance(exc, QedfsError):
                raise errors.opening_fault(location, exc) from exc
            raise
        connection = cls(location, transport, negotiated)
        nursery.start_soon(connection._listen, name=f"nbd {location}")
        return connection

    @property
    def load(self) -> int:
        """How many requests are in flight."""
        return len(self._replies.in_flight)

    async def read(self, pos: int, view: memoryview) -> None:
        """Fill `view` (format "B") with the bytes at `pos`; raises as `Source.read` does."""
        minimum = self.negotiated.minimum_block
        before = pos % minimum
        after = -(pos + len(view)) % minimum
        if before or after:
            bounce = memoryview(bytearray(before + len(view) + after))
            await self._read_aligned(pos - before, bounce)
            view[:] = bounce[before : before + len(view)]
        else:
            await self._read_aligned(pos, view)

    async def extents(self, pos: int, size: int) -> list[tuple[int, bool]] | None:
        """Describe the range as (size, reads as zeros) from `pos` on; None if the server cannot tell."""
        if self.negotiated.context is None:
            return None
        before = pos % self.negotiated.minimum_block
        asked = before + min(size, MAX_STATUS_RANGE - 2 * MAX_MINIMUM_BLOCK_SIZE)
        asked += -asked % self.negotiated.minimum_block
        waiting = await self._start(RequestType.BLOCK_STATUS, pos - before, asked, None)
        try:
            await self._finish(waiting)
        except Refusal as exc:
            if exc.transient:
                raise errors.reply_fault(self._location, exc) from exc
            return None  # the server agreed to tell about holes, but not about these
        clipped = _clip(waiting.request.extents or [], before, size)
        if not clipped:
            self.drop("the server described an extent smaller than its block size", Reason.ANSWER)
            raise self._dropped()
        return clipped

    def drop(self, why: str, kind: Reason = Reason.CUT) -> None:
        """Close at once; the requests in flight fail with SourceUnreachable. A second call does nothing."""
        if self.broken is not None:
            return
        self.broken, self._broken_by = why, kind
        self._transport.close()
        self._breaker.cancel()
        requests = list(self._replies.in_flight.values())
        self._replies.in_flight.clear()
        for request in requests:
            request.view = None
            request.wake()

    def _dropped(self) -> SourceUnreachable:
        return errors.dropped(self._location, self.broken or "", self._broken_by)

    async def aclose(self) -> None:
        """Say goodbye if that takes no time, and drop."""
        if self.broken is None and not self._sending.locked():
            gone = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
            with trio.move_on_after(FAREWELL_SECONDS), contextlib.suppress(*gone):
                async with self._sending:
                    await self._transport.send(encode_request(RequestType.DISC, 0))
        self.drop("closed")

    async def _read_aligned(self, pos: int, view: memoryview) -> None:
        step = self.negotiated.maximum_request
        started: list[_Waiting] = []
        try:
            for at in range(0, len(view), step):
                part = view[at : at + step]
                started.append(await self._start(RequestType.READ, pos + at, len(part), part))
                if len(started) % PARTS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
            for waiting in started:
                await self._finish(waiting)
        except Refusal as exc:
            raise errors.reply_fault(self._location, exc) from exc
        finally:
            for waiting in started:
                self._replies.abandon(waiting.request)

    async def _start(self, command: RequestType, pos: int, size: int, view: memoryview | None) -> _Waiting:
        # Lock.acquire costs a turn of the event loop even if the lock is free.
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self.broken is not None:
                raise self._dropped()
            answered = trio.Event()
            request = Request(command, self._next_cookie, pos, size, view, answered.set)
            self._next_cookie += 1
            now = trio.current_time()
            if not self._replies.in_flight:
                self._progress_at = now
                if self._breaker.deadline == math.inf:
                    self._breaker.deadline = now + STALL_SECONDS
            self._replies.expect(request)
            await self._send(encode_request(command, request.cookie, pos, size))
            return _Waiting(request, answered, now)
        finally:
            self._sending.release()

    async def _send(self, data: bytes) -> None:
        try:
            await self._transport.send(data)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self.drop(errors.reason(exc))
            raise self._dropped() from exc
        except BaseException:
            self.drop("a request was given up half sent")
            raise

    async def _finish(self, waiting: _Waiting) -> None:
        """Wait for the end of the reply; raises Refusal for an error reply, SourceUnreachable after a drop."""
        try:
            await waiting.answered.wait()
        except BaseException:
            self._replies.abandon(waiting.request)
            self._suspect(waiting.sent_at)
            raise
        if not waiting.request.finished:
            raise self._dropped() if self.broken is not None else errors.lost(self._location)
        failure = waiting.request.failure
        if failure is not None:
            if failure.code == ErrorCode.ESHUTDOWN:
                self.drop("the server is shutting down")
            raise failure

    def _suspect(self, sent_at: float) -> None:
        """A reader gave up on a request sent at `sent_at`: drop the connection if it has been silent since."""
        if self._progress_at <= sent_at <= trio.current_time() - HASTE_SECONDS:
            self.drop("the server does not answer", Reason.TIMEOUT)

    async def _listen(self) -> None:
        """Receive until the connection ends. Nothing but a cancellation from outside leaves this task."""
        try:
            while self.broken is None:
                with self._breaker:
                    await self._receive_all()
                self._judge_silence()
        except Violation as exc:
            self.drop(str(exc), Reason.ANSWER)
        except Exception as exc:
            self.drop(errors.reason(exc))
        finally:
            self.drop("qedfs is closing it")

    async def _receive_all(self) -> None:
        arrived, finished = 0, self._replies.finished
        while count := await self._transport.receive(self._replies):
            arrived += count
            self.received += count
            if arrived >= PROGRESS_SIZE or self._replies.finished != finished:
                arrived, finished = 0, self._replies.finished
                self._progress_at = trio.current_time()
        raise EOFError

    def _judge_silence(self) -> None:
        """The patience has run out, or was never needed: drop the connection, or be patient anew."""
        if self.broken is not None:
            return
        now = trio.current_time()
        busy = bool(self._replies.in_flight)
        if busy and now - self._progress_at >= STALL_SECONDS:
            self.drop(f"no progress for {STALL_SECONDS:.0f} s", Reason.TIMEOUT)
        self._give_up_lost(now)
        deadline = self._progress_at + STALL_SECONDS if busy else math.inf
        self._breaker = trio.CancelScope(deadline=deadline)

    def _give_up_lost(self, now: float) -> None:
        """Fail the oldest request if its reply got lost. What may still come of it is judged, and goes into the bin."""
        oldest = self._replies.oldest()
        if oldest is None or oldest.coverage.total:
            return
        if oldest.cookie != self._oldest[0]:
            self._oldest = (oldest.cookie, now)
        overtaken = self._next_cookie - oldest.cookie - self.load
        seen_for = now - self._oldest[1]  # from one look to the next it is a little less than STALL_SECONDS
        if seen_for > STALL_SECONDS / 2 and overtaken >= max(LOST_OVERTAKEN, LOST_ROUNDS * self.load):
            wake = oldest.wake
            self._replies.abandon(oldest)
            wake()


async def _shake_hands(
    transport: PlainTransport, location: Location, tls: ssl.SSLContext | None
) -> tuple[Transport, Negotiated]:
    """Drive the handshake's dialogue; the transport returned is the one that the dialogue ended on."""
    current: Transport = transport
    dialogue = negotiate(location.export, tls=tls is not None)
    answer = b""
    step = next(dialogue)
    while True:
        try:
            if isinstance(step, int):
                answer = await current.receive_exactly(step)
            elif isinstance(step, bytes):
                await current.send(step)
            elif tls is not None:  # START_TLS, which the dialogue asks for only then
                # A Unix socket has no name of its own to verify; libnbd expects "localhost" there, too.
                current = secure = TlsTransport(transport, tls, location.host or "localhost")
                await secure.handshake()
        except (EOFError, trio.BrokenResourceError) as exc:
            if current is not transport and errors.is_end(exc):
                raise EndedUnderTls from exc
            raise
        try:
            step = dialogue.send(answer)
        except StopIteration as end:
            return current, end.value


def _clip(extents: list[tuple[int, bool]], skip: int, size: int) -> list[tuple[int, bool]]:
    """Cut `skip` bytes off the front, and what leads beyond `size` after that."""
    clipped: list[tuple[int, bool]] = []
    for extent_size, zero in extents:
        taken = min(extent_size - skip, size)
        skip = max(skip - extent_size, 0)
        if taken > 0:
            clipped.append((taken, zero))
            size -= taken
    return clipped
