"""One connection to an NBD server, with many requests in flight that are matched to their replies by cookie.

Owns the life of the connection from connect to drop, and the tasks that wait for replies. Must not know other
connections, nor what happens after a drop.

Concurrency. `_listen` runs in the nursery that was given to `open`. Only this task receives. Any number of tasks call
`read` and `extents`. `_sending` serializes their requests on the wire, and a request is in the parser's `in_flight`
before its first byte is sent. Any task may call `drop` at any time. It does not await. After it, `broken` says why, the
socket is closed, and every request in flight has been woken as failed. There must be no await between the check of
`broken` and the insertion into `in_flight`, or a request could wait for ever for a reply on a dead connection.

Cancellation. A reader that is cancelled while it waits leaves at once. The parser forgets its buffer, puts the rest of
the reply into a bin, and the other requests continue. The connection is dropped as well if it has delivered nothing
since that request was sent, unless that was only a moment ago: the deadline of a reader is what reveals that a server
is gone. A reader that is cancelled while its request is half sent drops the connection.
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
from qedfs.source.nbd.gathering import Gathering
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

CONNECT_SECONDS = 10.0  # for name resolution, connect, TLS and NBD handshake together
# While requests are in flight, the connection is dropped if no reply ends within this time and fewer than PROGRESS_SIZE
# bytes arrive.
STALL_SECONDS = 30.0
PROGRESS_SIZE = 64 * 1024
# A reply of which nothing has arrived in about that time is considered lost if enough later requests have been
# answered: at least LOST_OVERTAKEN, and LOST_ROUNDS times the number in flight. (A server may answer in any order, and
# on a slow link some replies take long.)
LOST_OVERTAKEN = 8
LOST_ROUNDS = 4
# If a reader gives up sooner than this, that proves nothing about the server.
HASTE_SECONDS = 1.0
PARTS_PER_TURN = 64  # a read sends this many requests before other tasks get their turn
FAREWELL_SECONDS = 0.2
MAX_STATUS_RANGE = 2**31  # bytes per BLOCK_STATUS; the field allows 2^32-1


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
        self.received = 0  # bytes, including those of unfinished replies
        self._broken_by = Reason.CUT
        self._location = location
        self._transport = transport
        self._replies = Replies(structured=negotiated.structured, context=negotiated.context)
        self._sending = trio.Lock()
        self._next_cookie = 1
        self._breaker = trio.CancelScope()
        self._progress_at = 0.0
        self._oldest = (0, 0.0)  # cookie of the oldest request, and when it was first found to be the oldest

    @classmethod
    async def open(
        cls,
        location: Location,
        policy: Policy,
        tls: ssl.SSLContext | None,
        nursery: trio.Nursery,
        gathering: Gathering,
    ) -> Connection:
        """Connect and negotiate. Raises Refused, SourceError or SourceUnreachable, with everything closed."""
        transport: Transport | None = None
        try:
            give_up_at = trio.current_time() + CONNECT_SECONDS
            transport = await connect(location, policy, gathering, seconds=CONNECT_SECONDS)
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
        """Fill `view` (format "B") with the bytes at `pos`. Raises what `Source.read` raises."""
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
        """The extents from `pos` on as (size, reads as zeros); None if the server cannot tell."""
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
            return None  # the server reports holes, but not for this range
        clipped = _clip(waiting.request.extents or [], before, size)
        if not clipped:
            self.drop("the server described an extent smaller than its block size", Reason.ANSWER)
            raise self._dropped()
        return clipped

    def drop(self, why: str, kind: Reason = Reason.CUT) -> None:
        """Close at once. The requests in flight fail with SourceUnreachable. A second call does nothing."""
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
        """Send DISC if that does not take long, and drop."""
        if self.broken is None and not self._sending.locked():
            hung_up = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
            with trio.move_on_after(FAREWELL_SECONDS), contextlib.suppress(*hung_up):
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
        # Lock.acquire costs a round of the event loop even if the lock is free.
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
            self.drop("a request was cancelled half sent")
            raise

    async def _finish(self, waiting: _Waiting) -> None:
        """Wait for the end of the reply. Raises Refusal for an error reply, SourceUnreachable after a drop."""
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
        """A reader has given up on a request: drop the connection if it made no progress since `sent_at`."""
        if self._progress_at <= sent_at <= trio.current_time() - HASTE_SECONDS:
            self.drop("the server does not answer", Reason.TIMEOUT)

    async def _listen(self) -> None:
        """Receive until the connection ends. No exception leaves this task, except a cancellation from outside."""
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
        """The stall timer has expired: drop the connection if it made no progress, otherwise set the timer again."""
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
        """Fail the oldest request if its reply is lost. A reply that arrives later is validated and discarded."""
        oldest = self._replies.oldest()
        if oldest is None or oldest.coverage.total:
            return
        if oldest.cookie != self._oldest[0]:
            self._oldest = (oldest.cookie, now)
        overtaken = self._next_cookie - oldest.cookie - self.load
        seen_for = now - self._oldest[1]  # between two calls a little less than STALL_SECONDS can pass
        if seen_for > STALL_SECONDS / 2 and overtaken >= max(LOST_OVERTAKEN, LOST_ROUNDS * self.load):
            wake = oldest.wake
            self._replies.abandon(oldest)
            wake()


async def _shake_hands(
    transport: PlainTransport, location: Location, tls: ssl.SSLContext | None
) -> tuple[Transport, Negotiated]:
    """Drive the handshake. Returns the transport to use from now on, with TLS if that was started."""
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
            elif tls is not None:  # START_TLS; the dialogue yields it only if there is a context
                # A Unix socket has no host name to verify. Expect "localhost", as libnbd does.
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
    """Cut off the first `skip` bytes, and everything past `size` bytes after that."""
    clipped: list[tuple[int, bool]] = []
    for extent_size, zero in extents:
        taken = min(extent_size - skip, size)
        skip = max(skip - extent_size, 0)
        if taken > 0:
            clipped.append((taken, zero))
            size -= taken
    return clipped
