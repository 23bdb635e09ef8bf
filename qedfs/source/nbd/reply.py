"""Parser for NBD replies: fills the buffers of requests from the bytes of the transmission phase. No I/O.

Owns the requests in flight on one connection and the validation of every byte that answers them. Must not know sockets,
tasks or who waits: a finished request calls its `wake`.

The parser says where it wants the next bytes (`buffers`) and is told how many arrived (`received`). So one scattering
receive puts payload directly into the reader's buffer, and the header after it into a small scratch buffer. An
abandoned request (`abandon`) loses its buffer at once. The rest of its reply is validated as before, and received into
a buffer that nobody reads (the bin), so that the connection stays usable.

After a `Violation` the rest of the stream cannot be interpreted: the caller must drop the connection, and every request
in flight has failed. A well-formed error reply fails only its own request.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

from qedfs.source.nbd.coverage import Coverage
from qedfs.source.nbd.protocol import (
    CHUNK_DONE,
    MAX_STRING_SIZE,
    SIMPLE_REPLY_MAGIC,
    STATE_ZERO,
    STRUCTURED_REPLY_MAGIC,
    TRANSIENT_ERRORS,
    Chunk,
    Refusal,
    RequestType,
    Violation,
    describe_error,
)
from qedfs.source.zeros import clear

SIMPLE = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED = struct.Struct(">IHHQI")  # magic, flags, type, cookie, size of the payload
POSITION = struct.Struct(">Q")
HOLE = struct.Struct(">QI")  # position, size
ERROR = struct.Struct(">IH")  # error, size of the message
EXTENT = struct.Struct(">II")  # size, state

# For headers and small bodies, of which an error with the longest message is the largest. Payload that arrives together
# with them is copied once, so larger is not better. 8 KiB can receive a 4 KiB reply with its header in one call.
SCRATCH_SIZE = 8 * 1024
BIN_SIZE = 64 * 1024
MAX_ERRORS = 16  # error chunks in one reply
MAX_STATUS_SIZE = 4 + EXTENT.size * 1024 * 1024  # nbdkit describes up to 2^20 extents at once
MAX_EXTENTS = 8 * 1024  # only this many are used, to keep the event loop responsive; the caller asks for the rest


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One request in flight. `view` is the buffer of a read; None after the reader has left."""

    command: RequestType
    cookie: int
    pos: int
    size: int
    view: memoryview | None
    wake: Callable[[], None]
    failure: Refusal | None = None  # the server's error reply
    finished: bool = False  # the reply has ended, with or without `failure`
    coverage: Coverage = dataclasses.field(default_factory=Coverage)
    errors: int = 0  # error chunks so far
    extents: list[tuple[int, bool]] | None = None  # (size, reads as zeros)


class Replies:
    """The parser for one connection. `finished` counts the replies that have ended."""

    def __init__(self, *, structured: bool, context: int | None) -> None:
        self._structured = structured
        self._context = context
        self.in_flight: dict[int, Request] = {}
        self.finished = 0
        self._scratch = bytearray(SCRATCH_SIZE)
        self._scratch_view = memoryview(self._scratch)
        self._start = 0  # the unread bytes of the scratch buffer begin here ...
        self._end = 0  # ... and end here
        self._bin = memoryview(bytearray(BIN_SIZE))
        # The body being received: its request, position in the target, missing bytes, and whether it is the last.
        self._body: Request | None = None
        self._body_at = 0
        self._body_left = 0
        self._body_last = False
        self._status: bytearray | None = None  # the target when the body is a block status

    def expect(self, request: Request) -> None:
        """Register a request that is about to be sent."""
        self.in_flight[request.cookie] = request

    def abandon(self, request: Request) -> None:
        """Forget the reader of this request. From now on its buffer is not touched."""
        request.view = None
        request.wake = _nothing

    def oldest(self) -> Request | None:
        """The first request in flight that a reader still waits for."""
        return next((request for request in self.in_flight.values() if request.wake is not _nothing), None)

    def buffers(self) -> list[memoryview]:
        """The buffers for the next bytes, in this order. Never empty; valid until another method is called."""
        if self._body is None:
            return [self._scratch_view[self._end :]]
        target = self._body_target(self._body)
        # Unless the target takes the whole rest of the body (the bin may be too small), the next header is not next.
        return [target, self._scratch_view] if len(target) == self._body_left else [target]

    def received(self, count: int) -> None:
        """Process `count` bytes that were received into `buffers()`. Raises Violation."""
        if self._body is None:
            self._end += count
        else:
            taken = min(count, len(self._body_target(self._body)))
            self._body_at += taken
            self._body_left -= taken
            self._end = count - taken
            if self._body_left:
                return
            self._end_body(self._body)
        while self._body is None and self._take_reply():
            pass
        self._compact()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Process bytes that were received elsewhere, as TLS returns its own objects. Raises Violation."""
        rest = memoryview(data)
        while rest:
            target = self.buffers()[0]
            count = min(len(target), len(rest))
            target[:count] = rest[:count]
            rest = rest[count:]
            self.received(count)

    # Headers and small bodies, in the scratch buffer

    def _take_reply(self) -> bool:
        """Process one header with its small body. Returns False if a part of it is missing."""
        available = self._end - self._start
        if available < SIMPLE.size:
            return False
        magic, error, cookie = SIMPLE.unpack_from(self._scratch, self._start)
        if magic == SIMPLE_REPLY_MAGIC:
            self._start += SIMPLE.size
            self._take_simple(self._find(cookie), error)
            return True
        if magic != STRUCTURED_REPLY_MAGIC or not self._structured:
            raise Violation("the server sent something other than a reply")
        if available < STRUCTURED.size:
            return False
        _, flags, kind, cookie, size = STRUCTURED.unpack_from(self._scratch, self._start)
        return self._take_chunk(self._find(cookie), bool(flags & CHUNK_DONE), kind, size)

    def _find(self, cookie: int) -> Request:
        request = self.in_flight.get(cookie)
        if request is None:
            raise Violation("the server answered a request that is not in flight")
        return request

    def _take_simple(self, request: Request, error: int) -> None:
        if self._structured and (request.command == RequestType.READ or not error):
            raise Violation("the server sent a simple reply although structured replies were negotiated")
        if error:
            request.failure = _failure(error, b"")
            self._finish(request)
        else:
            request.coverage.add(0, request.size)
            self._begin_body(request, 0, request.size, last=True)

    def _take_chunk(self, request: Request, last: bool, kind: int, size: int) -> bool:
        head = STRUCTURED.size
        if kind == Chunk.OFFSET_DATA and request.command == RequestType.READ:
            if size <= POSITION.size:
                raise Violation("the server sent a data chunk without data")
            if self._end - self._start < head + POSITION.size:
                return False
            (pos,) = POSITION.unpack_from(self._scratch, self._start + head)
            at = self._cover(request, pos, size - POSITION.size)
            self._start += head + POSITION.size
            self._begin_body(request, at, size - POSITION.size, last=last)
            return True
        if kind == Chunk.BLOCK_STATUS and request.command == RequestType.BLOCK_STATUS:
            self._check_status_size(request, size)
            self._start += head
            self._status = bytearray(size)
            self._begin_body(request, 0, size, last=last)
            return True
        self._check_small_size(kind, size, last)
        if self._end - self._start < head + size:
            return False
        body = bytes(self._scratch_view[self._start + head : self._start + head + size])
        self._start += head + size
        self._take_small(request, kind, body)
        if last:
            self._finish(request)
        return True

    def _check_small_size(self, kind: int, size: int, last: bool) -> None:
        """Check the size before waiting for that many bytes."""
        if kind == Chunk.NONE:
            fits = size == 0 and last
        elif kind == Chunk.OFFSET_HOLE:
            fits = size == HOLE.size
        elif kind == Chunk.ERROR:
            fits = ERROR.size <= size <= ERROR.size + MAX_STRING_SIZE
        elif kind == Chunk.ERROR_OFFSET:
            fits = ERROR.size + POSITION.size <= size <= ERROR.size + MAX_STRING_SIZE + POSITION.size
        else:
            raise Violation(f"the server sent a chunk of type {kind}, which does not answer the request")
        if not fits:
            raise Violation(f"the server sent a chunk of type {kind} with a wrong size, {size}")

    def _check_status_size(self, request: Request, size: int) -> None:
        if request.extents is not None:
            raise Violation("the server described the extents of a range twice")
        if size < 4 + EXTENT.size or (size - 4) % EXTENT.size or size > MAX_STATUS_SIZE:
            raise Violation(f"the server sent a block status of a wrong size, {size}")

    def _take_small(self, request: Request, kind: int, body: bytes) -> None:
        if kind == Chunk.NONE:
            return
        if kind == Chunk.OFFSET_HOLE:
            pos, size = HOLE.unpack(body)
            if request.command != RequestType.READ or not size:
                raise Violation("the server sent a hole that answers no request")
            at = self._cover(request, pos, size)
            if request.view is not None:
                clear(request.view[at : at + size])
            return
        error, message_size = ERROR.unpack_from(body)
        tail = POSITION.size if kind == Chunk.ERROR_OFFSET else 0
        request.errors += 1
        if not error or ERROR.size + message_size + tail != len(body) or request.errors > MAX_ERRORS:
            raise Violation("the server sent a garbled error")
        if tail and not request.pos <= POSITION.unpack_from(body, len(body) - tail)[0] < request.pos + request.size:
            raise Violation("the server reported an error outside the request")
        request.failure = request.failure or _failure(error, body[ERROR.size : ERROR.size + message_size])

    def _cover(self, request: Request, pos: int, size: int) -> int:
        """The position of these bytes in the request, after a check that they belong there."""
        at = pos - request.pos
        if at < 0 or at + size > request.size:
            raise Violation("the server sent bytes from outside the request")
        request.coverage.add(at, at + size)
        return at

    # Bodies that may be large

    def _begin_body(self, request: Request, at: int, size: int, *, last: bool) -> None:
        self._body, self._body_at, self._body_left, self._body_last = request, at, size, last
        while self._body_left and self._start < self._end:
            target = self._body_target(request)
            count = min(len(target), self._end - self._start)
            target[:count] = self._scratch_view[self._start : self._start + count]
            self._start += count
            self._body_at += count
            self._body_left -= count
        if not self._body_left:
            self._end_body(request)

    def _body_target(self, request: Request) -> memoryview:
        if self._status is not None:
            return memoryview(self._status)[self._body_at : self._body_at + self._body_left]
        if request.view is None:
            return self._bin[: self._body_left]
        return request.view[self._body_at : self._body_at + self._body_left]

    def _end_body(self, request: Request) -> None:
        self._body = None
        if self._status is not None:
            status, self._status = self._status, None
            request.extents = self._read_extents(request, status)
        if self._body_last:
            self._finish(request)

    def _read_extents(self, request: Request, status: bytearray) -> list[tuple[int, bool]]:
        """Validate and merge the first extents. Only the last one may reach past the requested range."""
        if int.from_bytes(status[:4], "big") != self._context:
            raise Violation("the server described extents in a context that was not negotiated")
        found: list[tuple[int, bool]] = []
        left = request.size
        considered = memoryview(status)[4 : 4 + MAX_EXTENTS * EXTENT.size]
        for size, state in EXTENT.iter_unpack(considered):
            if not size or not left:
                raise Violation("the server described an extent without bytes or beyond the request")
            size = min(size, left)
            left -= size
            zero = bool(state & STATE_ZERO)
            if found and found[-1][1] == zero:
                found[-1] = (found[-1][0] + size, zero)
            else:
                found.append((size, zero))
        return found

    def _finish(self, request: Request) -> None:
        """The reply has ended: validate it as a whole, then wake the reader."""
        if request.failure is None:
            if request.command == RequestType.READ and request.coverage.total != request.size:
                missing = request.size - request.coverage.total
                raise Violation(f"the server ended a reply with {missing} bytes missing")
            if request.command == RequestType.BLOCK_STATUS and request.extents is None:
                raise Violation("the server ended a block status without any extent")
        del self.in_flight[request.cookie]
        self.finished += 1
        request.finished = True
        request.view = None
        request.wake()

    def _compact(self) -> None:
        rest = self._end - self._start
        if self._start:
            self._scratch[:rest] = self._scratch[self._start : self._end]
            self._start, self._end = 0, rest


def _failure(code: int, text: bytes) -> Refusal:
    return Refusal(f"the server reported {describe_error(code, text)}", transient=code in TRANSIENT_ERRORS, code=code)


def _nothing() -> None:
    pass
