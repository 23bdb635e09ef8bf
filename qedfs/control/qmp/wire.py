"""QMP framing: a stream of bytes -> JSON values, and messages -> lines. Pure, no I/O.

Owns message boundaries, the limits on size and nesting, and the recovery from garbage. Must not know what a message
means.

Clients such as the `qemu.qmp` library send JSON values back to back without a newline, so the end of a message is found
by counting brackets, as QEMU's JSON streamer does. After an error, parsing resumes at the next bracket, quote or line,
so malformed input may cause several errors. The byte 0xFF, which never occurs in UTF-8, discards a partly received
message and causes an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

MAX_MESSAGE_BYTES = 1 << 20  # QEMU allows 64 MiB, but our commands are far shorter
MAX_DEPTH = 128  # QEMU allows 1024, which exceeds Python's recursion limit

_RESET = 0xFF
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_BLANK = re.compile(rb"[ \t\r\n]*")
# Text outside brackets and strings. It ends where parsing may resume: at a bracket, a quote or the end of a line.
_WORD = re.compile(rb"[^\[\]{}\"\x00-\x08\x0a-\x1f\xff]*")
_PLAIN = re.compile(rb"[^\[\]{}\"\xff]*")  # inside brackets, outside strings
# The rest of a string. A control character in it is an error, so that an unmatched quote consumes at most one line.
_STRING = re.compile(rb"(?:[^\"\\\x00-\x1f\xff]+|\\[^\x00-\x1f\xff])*")

_MORE: Final = object()  # the result of a scan that needs more bytes


class WireError(Exception):
    """The input is not a message. The text becomes `desc` in the error reply."""


class Reader:
    """Splits received bytes into messages, which may arrive in any chunks. Scans each byte once."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._at = 0  # end of the scanned part of the buffer
        self._skipping = False  # the message is too large: discard it, and look only for its end
        self._in_string = False
        self._open = bytearray()  # the brackets that are open

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield each JSON value that is now complete, and a WireError for each malformed or too large one."""
        self._buffer += data
        while True:
            found = self._scan()
            if found is not _MORE:
                yield found
            elif len(self._buffer) > self._max_bytes and not self._skipping:
                self._skipping = True
                yield WireError("JSON message size limit exceeded")
            else:
                break
        if self._skipping:
            del self._buffer[: self._at]
            self._at = 0

    def _scan(self) -> Any:  # noqa: ANN401 - a JSON value, a WireError, or _MORE
        """Scan to the end of a message that is not discarded. Returns _MORE if it has not arrived yet."""
        while True:
            if self._in_string:
                found = self._through_string()
            elif self._open:
                found = self._to_bracket()
            else:
                found = self._begin()
            if found is not None:
                return found

    def _begin(self) -> Any:  # noqa: ANN401 - as `_scan`, None for "go on"
        """Between messages: skip blanks, then start the next message."""
        blank = _BLANK.match(self._buffer)
        del self._buffer[: blank.end() if blank else 0]
        self._at = 0
        if not self._buffer:
            return _MORE
        word = _WORD.match(self._buffer)
        self._at = word.end() if word else 0
        if self._at:
            # A word is never a valid QMP message. So it does no harm that a word in two chunks causes two errors.
            return self._end()
        return self._structural()

    def _to_bracket(self) -> Any:  # noqa: ANN401 - as `_begin`
        plain = _PLAIN.match(self._buffer, self._at)
        self._at = plain.end() if plain else self._at
        return _MORE if self._at == len(self._buffer) else self._structural()

    def _structural(self) -> Any:  # noqa: ANN401 - as `_begin`
        """Consume a bracket, a quote, or a character that is not allowed here."""
        byte = self._buffer[self._at]
        self._at += 1
        if byte == _QUOTE:
            self._in_string = True
        elif byte in b"{[":
            self._open.append(byte)
            if len(self._open) > MAX_DEPTH:
                return self._fail("nesting depth limit exceeded")
        elif byte in b"}]":
            # "{" and "}", "[" and "]" are two apart in ASCII.
            if not self._open or self._open.pop() != byte - 2:
                return self._fail(f"unexpected '{chr(byte)}'")
            if not self._open:
                return self._end()
        else:
            return self._fail("the message was cut off" if byte == _RESET else "stray control character")
        return None

    def _through_string(self) -> Any:  # noqa: ANN401 - as `_begin`
        string = _STRING.match(self._buffer, self._at)
        self._at = string.end() if string else self._at
        left = len(self._buffer) - self._at
        if not left or (left == 1 and self._buffer[self._at] == _BACKSLASH):
            return _MORE
        byte = self._buffer[self._at]
        if byte != _QUOTE:
            # Leave a control character for the next scan: it may be the end of the line.
            self._at += byte == _RESET
            return self._fail("invalid character in string")
        self._at += 1
        self._in_string = False
        return None if self._open else self._end()

    def _end(self) -> Any:  # noqa: ANN401 - as `_begin`
        """Decode the message that ends at `_at`, unless it is to be discarded."""
        text = bytes(self._buffer[: self._at])
        skipped = self._skipping
        self._forget()
        return None if skipped else _decoded(text)

    def _fail(self, reason: str) -> WireError | None:
        skipped = self._skipping
        self._forget()
        return None if skipped else WireError(f"JSON parse error, {reason}")

    def _forget(self) -> None:
        """Drop the scanned bytes and start over."""
        del self._buffer[: self._at]
        self._at = 0
        self._skipping = self._in_string = False
        self._open.clear()


def _decoded(text: bytes) -> Any:  # noqa: ANN401 - any JSON value, or a WireError
    try:
        return json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError:
        return WireError("JSON parse error, invalid UTF-8 sequence in string")
    except RecursionError:
        return WireError("JSON parse error, nesting depth limit exceeded")
    except ValueError as exc:
        # JSONDecodeError, the errors of the two hooks, and integers with thousands of digits.
        return WireError(f"JSON parse error, {exc}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _no_constant(name: str) -> Any:  # noqa: ANN401 - the signature that json wants
    raise ValueError(f"invalid keyword '{name}'")


def encode(message: object) -> bytes:
    """One message as a line that ends in CRLF, as in QEMU.

    ASCII only: an echoed id may contain lone surrogates, which UTF-8 cannot encode.
    """
    return json.dumps(message).encode("ascii") + b"\r\n"
