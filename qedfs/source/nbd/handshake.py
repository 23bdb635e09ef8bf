"""The fixed newstyle handshake of NBD, from the server's greeting to the transmission phase. No I/O.

Owns the dialogue and the validation of every answer. It is a generator. It yields the number of bytes that it needs
next, and is sent exactly these; or it yields bytes to be sent, or `START_TLS`. It returns the result of the
negotiation. So the dialogue reads from top to bottom. And because no byte is read ahead, nothing that arrived in the
clear can be mistaken for an answer under TLS.

Raises `Violation` if the server violates the protocol, `Refusal` if it declines.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Generator
from typing import Final

from qedfs.source.nbd.protocol import (
    MAX_EXPORT_SIZE,
    MAX_MINIMUM_BLOCK_SIZE,
    MAX_REQUEST_SIZE,
    MAX_STRING_SIZE,
    UNLIMITED_BLOCK_SIZE,
    Export,
    Negotiated,
    Refusal,
    Violation,
    printable,
)

GREETING_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x3E889045565A9

GREETING = struct.Struct(">QQH")  # magic, magic, handshake flags
OPTION = struct.Struct(">QII")  # magic, option, size of its data
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, size of its data

FIXED_NEWSTYLE = 1
NO_ZEROES = 2

OPTION_STARTTLS = 5
OPTION_GO = 7
OPTION_STRUCTURED_REPLY = 8
OPTION_SET_META_CONTEXT = 10

REPLY_ACK = 1
REPLY_INFO = 3
REPLY_META_CONTEXT = 4
REPLY_ERROR = 2**31  # the bit that is set in all errors
ERROR_UNSUPPORTED = REPLY_ERROR + 1
ERROR_POLICY = REPLY_ERROR + 2
ERROR_TLS_REQUIRED = REPLY_ERROR + 5
ERROR_UNKNOWN_EXPORT = REPLY_ERROR + 6
ERROR_SHUTDOWN = REPLY_ERROR + 7
ERROR_BLOCK_SIZE_REQUIRED = REPLY_ERROR + 8

_ERROR_NAMES = {
    ERROR_UNSUPPORTED: "not supported",
    ERROR_POLICY: "forbidden by its policy",
    REPLY_ERROR + 3: "invalid request",
    REPLY_ERROR + 4: "not supported on its platform",
    ERROR_TLS_REQUIRED: "TLS required",
    ERROR_UNKNOWN_EXPORT: "unknown export",
    ERROR_SHUTDOWN: "shutting down",
    ERROR_BLOCK_SIZE_REQUIRED: "block size constraints",
    REPLY_ERROR + 9: "request too big",
}

INFO_EXPORT = 0
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

CONTEXT = b"base:allocation"

# Specification, "Block size constraints". Also a lower bound for the requests that we have to split reads into.
SMALLEST_PREFERRED_BLOCK = 512

# A reply holds at most an id and a name, or an info type and a description. Both texts are bounded by MAX_STRING_SIZE.
MAX_REPLY_SIZE = MAX_STRING_SIZE + 64
MAX_REPLIES = 64  # to one option. Servers send two to four; the bound is for a server that never stops.


class Step(enum.Enum):
    """What the handshake asks of its driver, apart from sending and receiving."""

    START_TLS = enum.auto()


START_TLS: Final = Step.START_TLS

Action = int | bytes | Step
Dialogue = Generator[Action, bytes, Negotiated]


def negotiate(export: str, *, tls: bool) -> Dialogue:
    """Open `export`. With `tls`, only STARTTLS is sent in the clear, and a server without TLS is refused."""
    name = export.encode()
    if len(name) > MAX_STRING_SIZE:
        raise Refusal(f"the export name is longer than {MAX_STRING_SIZE} bytes")
    yield from _greet()
    if tls:
        yield from _start_tls()
    structured = yield from _structured_replies()
    context = (yield from _allocation_context(name)) if structured else None
    return (yield from _go(name, structured, context))


def _greet() -> Generator[Action, bytes, None]:
    magic, style, flags = GREETING.unpack((yield GREETING.size))
    if magic != GREETING_MAGIC:
        raise Violation("the server does not greet as an NBD server")
    if style == OLDSTYLE_MAGIC:
        raise Violation("the server speaks only the oldstyle NBD handshake")
    if style != OPTION_MAGIC:
        raise Violation("the server does not greet as an NBD server")
    if not flags & FIXED_NEWSTYLE:
        raise Violation("the server does not speak the fixed newstyle NBD handshake")
    yield struct.pack(">I", FIXED_NEWSTYLE | (flags & NO_ZEROES))


def _start_tls() -> Generator[Action, bytes, None]:
    yield _option(OPTION_STARTTLS)
    kind, body = yield from _reply(OPTION_STARTTLS)
    if kind in (ERROR_UNSUPPORTED, ERROR_POLICY):
        raise Refusal("the server does not offer TLS, which nbds:// requires")
    if kind != REPLY_ACK or body:
        raise _unexpected("STARTTLS", kind, body)
    yield START_TLS


def _structured_replies() -> Generator[Action, bytes, bool]:
    yield _option(OPTION_STRUCTURED_REPLY)
    kind, body = yield from _reply(OPTION_STRUCTURED_REPLY)
    if kind == REPLY_ACK and not body:
        return True
    if kind & REPLY_ERROR and kind not in (ERROR_TLS_REQUIRED, ERROR_SHUTDOWN):
        return False
    raise _unexpected("STRUCTURED_REPLY", kind, body)


def _allocation_context(name: bytes) -> Generator[Action, bytes, int | None]:
    queries = struct.pack(">II", 1, len(CONTEXT)) + CONTEXT
    yield _option(OPTION_SET_META_CONTEXT, struct.pack(">I", len(name)) + name + queries)
    context: int | None = None
    for _ in range(MAX_REPLIES):
        kind, body = yield from _reply(OPTION_SET_META_CONTEXT)
        if kind == REPLY_ACK and not body:
            return context
        if kind & REPLY_ERROR and kind not in (ERROR_TLS_REQUIRED, ERROR_SHUTDOWN) and context is None:
            return None
        if kind != REPLY_META_CONTEXT or body[4:] != CONTEXT or context is not None:
            raise _unexpected("SET_META_CONTEXT", kind, body)
        context = int.from_bytes(body[:4], "big")
    raise Violation("the server never ends its answer to SET_META_CONTEXT")


def _go(name: bytes, structured: bool, context: int | None) -> Dialogue:
    infos = struct.pack(">HHH", 2, INFO_BLOCK_SIZE, INFO_DESCRIPTION)
    yield _option(OPTION_GO, struct.pack(">I", len(name)) + name + infos)
    found: dict[int, bytes] = {}
    for _ in range(MAX_REPLIES):
        kind, body = yield from _reply(OPTION_GO)
        if kind == REPLY_ACK and not body:
            return _agreed(found, structured, context)
        if kind == ERROR_UNKNOWN_EXPORT:
            raise Refusal(f"the server has no export named {name.decode()!r}")
        if kind != REPLY_INFO or len(body) < 2:
            raise _unexpected("GO", kind, body)
        what = int.from_bytes(body[:2], "big")
        if what in found:
            raise Violation(f"the server answered GO with the information {what} twice")
        found[what] = body[2:]
    raise Violation("the server never ends its answer to GO")


def _agreed(found: dict[int, bytes], structured: bool, context: int | None) -> Negotiated:
    if len(found.get(INFO_EXPORT, b"")) != 10:
        raise Violation("the server did not report the size of the export")
    size, raw_flags = struct.unpack(">QH", found[INFO_EXPORT])
    if size > MAX_EXPORT_SIZE:
        raise Violation(f"the server announces an export of {size} bytes, more than 2^63-1")
    flags = Export(raw_flags) if raw_flags & Export.HAS_FLAGS else Export(0)
    announced = _block_sizes(found[INFO_BLOCK_SIZE]) if INFO_BLOCK_SIZE in found else None
    minimum, _, most = announced or (1, MAX_REQUEST_SIZE, MAX_REQUEST_SIZE)
    if size % minimum:
        raise Violation(f"the size of the export, {size}, is not a multiple of its minimum block size {minimum}")
    description = printable(found.get(INFO_DESCRIPTION, b""))
    return Negotiated(
        size, flags, structured, context, minimum, min(most, MAX_REQUEST_SIZE), description, block_sizes=announced
    )


def _block_sizes(info: bytes) -> tuple[int, int, int]:
    """The announced block sizes, checked: minimum, preferred and maximum."""
    if len(info) != 12:
        raise Violation("the server announces malformed block sizes")
    minimum, preferred, maximum = struct.unpack(">III", info)
    said = f"block sizes (minimum {minimum}, preferred {preferred}, maximum {maximum})"
    if not _is_power_of_two(minimum) or minimum > MAX_MINIMUM_BLOCK_SIZE:
        raise Violation(f"the server announces {said}: the minimum is not a power of two up to 64 KiB")
    if not _is_power_of_two(preferred) or preferred < max(minimum, SMALLEST_PREFERRED_BLOCK):
        raise Violation(f"the server announces {said}: the preferred size is not a power of two that fits the minimum")
    if maximum < preferred or (maximum != UNLIMITED_BLOCK_SIZE and maximum % minimum):
        raise Violation(f"the server announces {said}: the maximum does not fit the others")
    return minimum, preferred, maximum


def _is_power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def _option(option: int, data: bytes = b"") -> bytes:
    return OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def _reply(option: int) -> Generator[Action, bytes, tuple[int, bytes]]:
    magic, answered, kind, size = OPTION_REPLY.unpack((yield OPTION_REPLY.size))
    if magic != OPTION_REPLY_MAGIC:
        raise Violation("the server sent something other than the answer to an option")
    if answered != option:
        raise Violation(f"the server answered option {answered} instead of {option}")
    if size > MAX_REPLY_SIZE:
        raise Violation(f"the server announces an answer of {size} bytes to option {option}")
    return kind, (yield size) if size else b""


def _unexpected(option: str, kind: int, body: bytes) -> Violation | Refusal:
    if not kind & REPLY_ERROR:
        return Violation(f"the server gave an unusable answer of type {kind} to {option}")
    if kind == ERROR_TLS_REQUIRED:
        return Refusal("the server requires TLS; name it with nbds:// instead of nbd://")
    words = printable(body)
    said = _ERROR_NAMES.get(kind, f"error {kind - REPLY_ERROR}") + (f" ({words})" if words else "")
    return Refusal(f"the server refused {option}: {said}", transient=kind == ERROR_SHUTDOWN)
