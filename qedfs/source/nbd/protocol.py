"""The parts of the NBD protocol that both handshake and transmission phase use: constants, requests, exceptions.

Owns the wire constants, the layout of a request, and the two exceptions for a bad answer. Pure: no I/O, no trio. The
rules come from the NBD protocol specification (NetworkBlockDevice/nbd, doc/proto.md). All numbers on the wire are
big-endian.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

MAX_STRING_SIZE = 4096  # specification, "Terminology": the longest string that either side may send
MAX_EXPORT_SIZE = 2**63 - 1  # larger ones do not fit a file offset (libnbd CVE-2023-5215)
MAX_MINIMUM_BLOCK_SIZE = 64 * 1024  # specification, "Block size constraints"
UNLIMITED_BLOCK_SIZE = 0xFFFF_FFFF  # the maximum payload that a server without a limit announces
# Specification: "an efficient portable client" stays within 32 MiB if the server has announced no limit.
MAX_REQUEST_SIZE = 32 * 1024 * 1024

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, position, size

STATE_ZERO = 2  # base:allocation: the extent reads as zeros. The other bit (1, hole) says nothing about the bytes.
CHUNK_DONE = 1  # the last chunk of a reply


class RequestType(enum.IntEnum):
    """The requests that we send."""

    READ = 0
    DISC = 2
    BLOCK_STATUS = 7


class Chunk(enum.IntEnum):
    """Types of structured reply chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


class Export(enum.IntFlag):
    """The transmission flags of an export. We use the first and CAN_MULTI_CONN; the others are for people."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class ErrorCode(enum.IntEnum):
    """Error numbers of replies. A code outside this list counts as EINVAL (specification, "Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# With these errors a retry may succeed; the others are permanent.
TRANSIENT_ERRORS = frozenset({ErrorCode.EIO, ErrorCode.ENOMEM, ErrorCode.ENOSPC, ErrorCode.ESHUTDOWN})


class Violation(Exception):
    """The server violated the protocol. Nothing that follows on this connection can be interpreted."""


class Refusal(Exception):
    """The server refused a request. `transient`: a retry may succeed. `code`: of an error reply, otherwise 0."""

    def __init__(self, message: str, *, transient: bool = False, code: int = 0) -> None:
        super().__init__(message)
        self.transient = transient
        self.code = code


@dataclasses.dataclass(frozen=True, slots=True)
class Negotiated:
    """The result of the handshake. Sizes in bytes."""

    size: int
    flags: Export
    structured: bool
    context: int | None  # the id of base:allocation in block status replies; None: the server does not report holes
    minimum_block: int = 1  # position and size of a request must be multiples of it
    maximum_request: int = MAX_REQUEST_SIZE
    description: str = ""  # of the export, for people
    block_sizes: tuple[int, int, int] | None = None  # minimum, preferred, maximum as announced; for people, too

    @property
    def multi_conn(self) -> bool:
        """Whether the server supports several connections to the export."""
        return bool(self.flags & Export.CAN_MULTI_CONN)


def encode_request(command: RequestType, cookie: int, pos: int = 0, size: int = 0) -> bytes:
    """Encode a request of the transmission phase."""
    return REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, pos, size)


def describe_error(code: int, text: bytes = b"") -> str:
    """Describe an error reply for people. The server's text is truncated and stripped of control characters."""
    try:
        name = ErrorCode(code).name
    except ValueError:
        name = f"error {code}"
    words = printable(text)
    return f"{name} ({words})" if words else name


def printable(text: bytes, limit: int = 200) -> str:
    """Turn a message from a server into one line that is safe to print."""
    line = text[: 4 * limit].decode("utf-8", "replace")
    return "".join(char if char.isprintable() else " " for char in line).strip()[:limit]
