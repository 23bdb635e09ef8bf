"""What an NBD server can do wrong, by name; each entry also says where and how a client should notice.

The well-behaved ones (`at="never"`) differ in ways that the specification allows. The hooks assume reads of at least
two bytes.
"""

from __future__ import annotations

import struct

from tests.fakes.nbd_server import (
    ACK,
    DATA,
    EINVAL,
    EIO,
    ENOMEM,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ERROR,
    ERROR_OFFSET,
    ESHUTDOWN,
    EXTENTS,
    GREETING,
    HOLE,
    INFO,
    META_CONTEXT,
    NONE,
    OPTION_GO,
    OPTION_META,
    OPTION_STARTTLS,
    OPTION_STRUCTURED,
    POLICY,
    SHUTDOWN,
    TLS_REQUIRED,
    UNKNOWN,
    UNSUPPORTED,
    Behaviour,
    Call,
    chunk,
    data_chunk,
    error_chunk,
    hole_chunk,
    option_reply,
    simple,
    status_chunk,
)

MULTI_CONN = 1 | 1 << 8


def _go(*infos: bytes, end: bytes = option_reply(OPTION_GO, ACK)) -> dict[int, bytes]:
    return {OPTION_GO: b"".join(option_reply(OPTION_GO, INFO, info) for info in infos) + end}


def _refuse(option: int, kind: int, text: bytes = b"") -> dict[int, bytes]:
    return {option: option_reply(option, kind, text)}


def _blocks(minimum: int, preferred: int, maximum: int, size: int = 1 << 20) -> dict[int, bytes]:
    return _go(struct.pack(">HQH", 0, size, 1), struct.pack(">HIII", 3, minimum, preferred, maximum))


_EXPORT = struct.pack(">HQH", 0, 1 << 20, 1)
_CONTEXT = struct.pack(">I", 7) + b"base:allocation"


def _two_contexts() -> dict[int, bytes]:
    one = option_reply(OPTION_META, META_CONTEXT, _CONTEXT)
    return {OPTION_META: one + one + option_reply(OPTION_META, ACK)}


OPENING: dict[str, Behaviour] = {
    "wrong-magic": Behaviour(says="not greet as an NBD server", greeting=b"X" * 18),
    "http": Behaviour(says="not greet as an NBD server", greeting=b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "wrong-style": Behaviour(says="not greet as an NBD server", greeting=b"NBDMAGICIHAVENOT\0\3"),
    "oldstyle": Behaviour(says="oldstyle", greeting=b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(136)),
    "not-fixed": Behaviour(says="fixed newstyle", greeting=GREETING + b"\0\2"),
    "reply-magic": Behaviour(
        says="something other than the answer",
        options={OPTION_STRUCTURED: option_reply(OPTION_STRUCTURED, ACK, magic=1)},
    ),
    "reply-to-another-option": Behaviour(
        says="answered option 7 instead of", options={OPTION_STRUCTURED: option_reply(OPTION_GO, ACK)}
    ),
    "reply-type-unknown": Behaviour(says="type 99", options=_refuse(OPTION_STRUCTURED, 99)),
    "reply-oversized": Behaviour(
        says="answer of 4294967295 bytes",
        options={OPTION_STRUCTURED: struct.pack(">QIII", 0x3E889045565A9, OPTION_STRUCTURED, ACK, 2**32 - 1)},
    ),
    "ack-with-body": Behaviour(says="type 1", options=_refuse(OPTION_GO, ACK, b"x")),
    "context-unasked": Behaviour(
        says="SET_META_CONTEXT",
        options={OPTION_META: option_reply(OPTION_META, META_CONTEXT, struct.pack(">I", 7) + b"qemu:dirty")},
    ),
    "context-twice": Behaviour(says="SET_META_CONTEXT", options=_two_contexts()),
    "context-endless": Behaviour(says="type 3", options=_refuse(OPTION_META, INFO)),
    "info-missing": Behaviour(says="did not report the size", options=_go()),
    "info-short": Behaviour(says="did not report the size", options=_go(_EXPORT[:-1])),
    "info-twice": Behaviour(says="twice", options=_go(_EXPORT, _EXPORT)),
    "info-without-type": Behaviour(says="type 3", options=_go(b"\0")),
    "info-endless": Behaviour(says="never ends", options=_go(*(struct.pack(">H", 1000 + n) for n in range(80)))),
    "size-negative": Behaviour(says="more than 2^63-1", size=2**63),
    "size-huge": Behaviour(says="more than 2^63-1", size=2**64 - 1),
    "block-minimum-zero": Behaviour(says="minimum is not a power of two", options=_blocks(0, 4096, 2**25)),
    "block-minimum-odd": Behaviour(says="minimum is not a power of two", options=_blocks(513, 4096, 2**25)),
    "block-minimum-large": Behaviour(says="up to 64 KiB", options=_blocks(2**17, 2**17, 2**25)),
    "block-preferred-odd": Behaviour(says="preferred size", options=_blocks(1, 1000, 2**25)),
    "block-preferred-small": Behaviour(says="preferred size", options=_blocks(4096, 512, 2**25)),
    "block-preferred-tiny": Behaviour(says="preferred size", options=_blocks(1, 1, 1)),
    "block-maximum-small": Behaviour(says="maximum does not fit", options=_blocks(512, 4096, 2048)),
    "block-maximum-odd": Behaviour(says="maximum does not fit", options=_blocks(512, 4096, 2**25 + 1)),
    "block-short": Behaviour(says="malformed block sizes", options=_go(_EXPORT, b"\0\3\0\0")),
    "size-not-whole-blocks": Behaviour(says="not a multiple of", options=_blocks(512, 4096, 2**25, size=1000)),
    "export-unknown": Behaviour(says="no export named", options=_refuse(OPTION_GO, UNKNOWN)),
    "policy": Behaviour(
        says="forbidden by its policy (not for you)", options=_refuse(OPTION_GO, POLICY, b"not for\nyou")
    ),
    "error-unknown": Behaviour(says="error 77", options=_refuse(OPTION_GO, 2**31 + 77)),
    "go-unsupported": Behaviour(says="refused GO: not supported", options=_refuse(OPTION_GO, UNSUPPORTED)),
    "tls-required": Behaviour(says="nbds://", options=_refuse(OPTION_STRUCTURED, TLS_REQUIRED)),
    "tls-required-late": Behaviour(says="nbds://", options=_refuse(OPTION_GO, TLS_REQUIRED)),
}
OPENING = {name: Behaviour(**{**vars(each), "at": "open", "permanent": True}) for name, each in OPENING.items()}

TLS: dict[str, Behaviour] = {
    "tls-unsupported": Behaviour(
        at="open", permanent=True, says="does not offer TLS", options=_refuse(OPTION_STARTTLS, UNSUPPORTED)
    ),
    "tls-forbidden": Behaviour(
        at="open", permanent=True, says="does not offer TLS", options=_refuse(OPTION_STARTTLS, POLICY)
    ),
    "tls-faked": Behaviour(
        at="open",
        says="cannot connect: SSLError",
        options={OPTION_STARTTLS: option_reply(OPTION_STARTTLS, ACK) + option_reply(OPTION_STRUCTURED, ACK)},
    ),
}

OPENING_LATER: dict[str, Behaviour] = {
    "greeting-cut": Behaviour(at="open", says="closed the connection", greeting=GREETING[:9], hangs_up=True),
    "hangs-up-on-option": Behaviour(
        at="open", says="closed the connection", options={OPTION_STRUCTURED: b""}, hangs_up=True
    ),
    "go-cut": Behaviour(
        at="open", says="closed the connection", options={OPTION_GO: _go(_EXPORT)[OPTION_GO][:-1]}, hangs_up=True
    ),
    "shutting-down": Behaviour(at="open", says="shutting down", options=_refuse(OPTION_GO, SHUTDOWN)),
    "deaf": Behaviour(at="open", says="timed out", deaf=True),
}


def _halves(call: Call) -> tuple[int, bytes, bytes]:
    half = call.size // 2
    return half, call.data[:half], call.data[half:]


def _overlapping(call: Call) -> bytes:
    half, first, _ = _halves(call)
    return data_chunk(call.cookie, call.pos, first, done=False) + data_chunk(
        call.cookie, call.pos + half - 1, call.data[half - 1 :]
    )


def _missing(call: Call) -> bytes:
    return data_chunk(call.cookie, call.pos, call.data[:-1])


def _scattered(call: Call) -> bytes:
    return b"".join(
        data_chunk(call.cookie, call.pos + at, call.data[at : at + 1], done=False) for at in range(0, call.size, 2)
    )


def _error_after_data(call: Call) -> bytes:
    half, first, _ = _halves(call)
    error = struct.pack(">IHQ", EIO, 0, call.pos + half)
    return data_chunk(call.cookie, call.pos, first, done=False) + chunk(ERROR_OFFSET, call.cookie, error)


def _many_errors(call: Call) -> bytes:
    return error_chunk(call.cookie, EIO, done=False) * 20 + chunk(NONE, call.cookie)


def _error_outside(call: Call) -> bytes:
    return chunk(ERROR_OFFSET, call.cookie, struct.pack(">IHQ", EIO, 0, call.pos + call.size))


READING: dict[str, Behaviour] = {
    "cookie-unknown": Behaviour(says="not in flight", read=lambda c: data_chunk(c.cookie + 1000, c.pos, c.data)),
    "cookie-unknown-simple": Behaviour(says="not in flight", read=lambda c: simple(c.cookie + 1000)),
    "magic-wrong": Behaviour(says="something other than a reply", read=lambda c: b"\x12" * 64),
    "simple-reply": Behaviour(says="simple reply although", read=lambda c: simple(c.cookie, 0, c.data)),
    "simple-error": Behaviour(says="simple reply although", read=lambda c: simple(c.cookie, EIO)),
    "structured-reply-unagreed": Behaviour(
        says="something other than a reply", structured=False, read=lambda c: data_chunk(c.cookie, c.pos, c.data)
    ),
    "chunk-before": Behaviour(
        says="outside the request", read=lambda c: data_chunk(c.cookie, c.pos - 1, b"x" + c.data[1:])
    ),
    "chunk-after": Behaviour(says="outside the request", read=lambda c: data_chunk(c.cookie, c.pos + 1, c.data)),
    "chunk-longer": Behaviour(says="outside the request", read=lambda c: data_chunk(c.cookie, c.pos, c.data + b"x")),
    "chunk-oversized": Behaviour(
        says="outside the request",
        read=lambda c: chunk(DATA, c.cookie, struct.pack(">Q", c.pos), size=2**32 - 1),
    ),
    "chunk-position-negative": Behaviour(
        says="outside the request", read=lambda c: data_chunk(c.cookie, 2**64 - 1, c.data)
    ),
    "chunks-overlapping": Behaviour(says="twice", read=_overlapping),
    "chunk-twice": Behaviour(says="twice", read=lambda c: data_chunk(c.cookie, c.pos, c.data, done=False) * 2),
    "chunk-empty": Behaviour(says="without data", read=lambda c: data_chunk(c.cookie, c.pos, b"")),
    "chunk-type-unknown": Behaviour(says="type 9,", read=lambda c: chunk(9, c.cookie, b"x")),
    "chunk-error-type-unknown": Behaviour(says="type 32777,", read=lambda c: chunk(2**15 + 9, c.cookie, b"x")),
    "chunk-of-status": Behaviour(says="type 5,", read=lambda c: status_chunk(c.cookie, [(c.size, 0)])),
    "chunks-scattered": Behaviour(says="scattered", read=_scattered),
    "bytes-missing": Behaviour(says="1 bytes missing", read=_missing),
    "nothing": Behaviour(says="bytes missing", read=lambda c: chunk(NONE, c.cookie)),
    "nothing-endless": Behaviour(says="wrong size", read=lambda c: chunk(NONE, c.cookie, done=False)),
    "nothing-with-body": Behaviour(says="wrong size", read=lambda c: chunk(NONE, c.cookie, b"x")),
    "hole-outside": Behaviour(says="outside the request", read=lambda c: hole_chunk(c.cookie, c.pos, c.size + 1)),
    "hole-huge": Behaviour(says="outside the request", read=lambda c: hole_chunk(c.cookie, c.pos, 2**32 - 1)),
    "hole-empty": Behaviour(says="hole that answers no request", read=lambda c: hole_chunk(c.cookie, c.pos, 0)),
    "hole-short": Behaviour(says="wrong size", read=lambda c: chunk(HOLE, c.cookie, bytes(11))),
    "hole-over-data": Behaviour(
        says="twice",
        read=lambda c: data_chunk(c.cookie, c.pos, c.data, done=False) + hole_chunk(c.cookie, c.pos, c.size),
    ),
    "error-oversized": Behaviour(says="wrong size", read=lambda c: chunk(ERROR, c.cookie, b"", size=2**31)),
    "error-text-oversized": Behaviour(says="wrong size", read=lambda c: error_chunk(c.cookie, EIO, b"x" * 4097)),
    "error-garbled": Behaviour(says="garbled error", read=lambda c: chunk(ERROR, c.cookie, struct.pack(">IH", EIO, 9))),
    "error-of-success": Behaviour(says="garbled error", read=lambda c: error_chunk(c.cookie, 0)),
    "error-short": Behaviour(says="wrong size", read=lambda c: chunk(ERROR, c.cookie, b"\0\0\0\5")),
    "error-outside": Behaviour(says="error outside", read=_error_outside),
    "errors-endless": Behaviour(says="garbled error", read=_many_errors),
    "hangs-up": Behaviour(says="closed the connection", hangs_up=True, read=lambda c: b""),
    "cut-in-header": Behaviour(
        says="closed the connection", hangs_up=True, read=lambda c: data_chunk(c.cookie, c.pos, c.data)[:11]
    ),
    "cut-in-payload": Behaviour(
        says="closed the connection", hangs_up=True, read=lambda c: data_chunk(c.cookie, c.pos, c.data)[:-1]
    ),
    "EIO": Behaviour(says="EIO (disk on fire)", read=lambda c: error_chunk(c.cookie, EIO, b"disk\non fire\x1b")),
    "EIO-after-data": Behaviour(says="EIO", read=_error_after_data),
    "EIO-simple": Behaviour(says="EIO", structured=False, read=lambda c: simple(c.cookie, EIO)),
    "ENOMEM": Behaviour(says="ENOMEM", read=lambda c: error_chunk(c.cookie, ENOMEM)),
    "ENOSPC": Behaviour(says="ENOSPC", read=lambda c: error_chunk(c.cookie, ENOSPC)),
    "ESHUTDOWN": Behaviour(says="ESHUTDOWN", read=lambda c: error_chunk(c.cookie, ESHUTDOWN)),
    "EINVAL": Behaviour(says="EINVAL", permanent=True, read=lambda c: error_chunk(c.cookie, EINVAL)),
    "EPERM": Behaviour(says="EPERM", permanent=True, read=lambda c: error_chunk(c.cookie, EPERM)),
    "ENOTSUP": Behaviour(says="ENOTSUP", permanent=True, read=lambda c: error_chunk(c.cookie, ENOTSUP)),
    "EOVERFLOW": Behaviour(says="EOVERFLOW", permanent=True, read=lambda c: error_chunk(c.cookie, EOVERFLOW)),
    "error-code-unknown": Behaviour(says="error 4242", permanent=True, read=lambda c: error_chunk(c.cookie, 4242)),
}
READING = {name: Behaviour(**{**vars(each), "at": "read"}) for name, each in READING.items()}

AFTER_A_READ: dict[str, Behaviour] = {
    "reply-twice": Behaviour(at="after", says="not in flight", read=lambda c: data_chunk(c.cookie, c.pos, c.data) * 2),
    "reply-and-junk": Behaviour(
        at="after", says="something other", read=lambda c: data_chunk(c.cookie, c.pos, c.data) + b"junk" * 8
    ),
}

DESCRIBING: dict[str, Behaviour] = {
    "extent-empty": Behaviour(says="without bytes", status=lambda c: status_chunk(c.cookie, [(0, 3)])),
    "extent-beyond": Behaviour(says="beyond", status=lambda c: status_chunk(c.cookie, [(c.size, 3), (1, 0)])),
    "extents-none": Behaviour(says="wrong size", status=lambda c: status_chunk(c.cookie, [])),
    "extents-odd": Behaviour(says="wrong size", status=lambda c: chunk(EXTENTS, c.cookie, bytes(13))),
    "extents-oversized": Behaviour(says="wrong size", status=lambda c: chunk(EXTENTS, c.cookie, size=2**32 - 4)),
    "extents-of-another-context": Behaviour(
        says="context that was not negotiated", status=lambda c: status_chunk(c.cookie, [(c.size, 3)], context=8)
    ),
    "extents-twice": Behaviour(
        says="extents of a range twice", status=lambda c: status_chunk(c.cookie, [(c.size, 3)], done=False) * 2
    ),
    "extents-missing": Behaviour(says="without any extent", status=lambda c: chunk(NONE, c.cookie)),
    "extents-as-data": Behaviour(says="type 1,", status=lambda c: data_chunk(c.cookie, c.pos, c.data)),
    "extents-as-hole": Behaviour(says="answers no request", status=lambda c: hole_chunk(c.cookie, c.pos, c.size)),
    "extents-simple": Behaviour(says="simple reply although", status=lambda c: simple(c.cookie)),
    "extents-EIO": Behaviour(says="EIO", status=lambda c: error_chunk(c.cookie, EIO)),
}
DESCRIBING = {name: Behaviour(**{**vars(each), "at": "extents"}) for name, each in DESCRIBING.items()}


def _backwards(call: Call) -> bytes:
    """Three pieces, the last one first; the middle one as a hole when it is one."""
    third = call.size // 3
    first, middle, last = call.data[:third], call.data[third : 2 * third], call.data[2 * third :]
    at = call.pos + third
    if middle and not any(middle):
        between = hole_chunk(call.cookie, at, third, done=False)
    else:
        between = data_chunk(call.cookie, at, middle, done=False) if middle else b""
    return (
        data_chunk(call.cookie, call.pos + 2 * third, last, done=False)
        + (data_chunk(call.cookie, call.pos, first, done=False) if first else b"")
        + between
        + chunk(NONE, call.cookie)
    )


WELL_BEHAVED: dict[str, Behaviour] = {
    "correct": Behaviour(),
    "multi-conn": Behaviour(flags=MULTI_CONN),
    "simple-replies": Behaviour(structured=False),
    "no-flags": Behaviour(flags=1 << 8),
    "pieces-backwards": Behaviour(read=_backwards),
    "blocks-of-512": Behaviour(blocks=(512, 4096, 2**32 - 1)),
    "blocks-small-maximum": Behaviour(blocks=(1, 4096, 65536)),
    "extents-unsupported": Behaviour(status=lambda c: error_chunk(c.cookie, ENOTSUP)),
    "no-context": Behaviour(options={OPTION_META: option_reply(OPTION_META, ACK)}),
    "multi-conn-in-name-only": Behaviour(flags=MULTI_CONN, first_connections_only=1),
    "silent": Behaviour(silent=True),
}

BEHAVIOURS: dict[str, Behaviour] = {
    **WELL_BEHAVED,
    **OPENING,
    **OPENING_LATER,
    **TLS,
    **READING,
    **AFTER_A_READ,
    **DESCRIBING,
}
