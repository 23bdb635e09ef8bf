"""QMP on the wire: a stream of bytes -> JSON values, and messages -> lines. Pure, no I/O.

Owns where one message ends and the next begins, the bounds on size and nesting, and how garbage is passed over. Must
not know what a message means.

Clients such as the `qemu.qmp` library send JSON back to back without a newline between, so the end of a message is
found by counting brackets, as QEMU's streamer does. What cannot be read costs one error; reading goes on at the next
bracket or line. The byte 0xFF, which no text contains, throws away what is half received.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

MAX_MESSAGE_BYTES = 1 << 20  # QEMU allows 64 MiB; no command of ours needs a thousandth of it
MAX_DEPTH = 128  # QEMU allows 1024, which Python's own decoder does not reach

_RESET = 0xFF
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_BLANK = re.compile(rb"[ \t\r\n]*")
# A word outside brackets. Brackets, quotes and line ends are where reading may begin again.
_WORD = re.compile(rb"[^\[\]{}\"\x00-\x08\x0a-\x1f\xff]*")
_PLAIN = re.compile(rb"[^\[\]{}\"\xff]*")  # inside brackets, outside strings
# A raw control character is an error in a string, so that a lone quote swallows one line at the most.
_STRING = re.compile(rb"(?:[^\"\\\x00-\x1f\xff]+|\\[^\x00-\x1f\xff])*")

_MORE: Final = object()  # nothing can be said before more bytes come


class WireError(Exception):
    """What arrived is no message. The text is what QMP answers in `desc`."""


class Reader:
    """Cuts received bytes into messages, however they were cut on the way. Each byte is looked at once."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._at = 0  # looked at up to here
        self._skipping = False  # the message is too large: only its end is of interest
        self._in_string = False
        self._open = bytearray()  # the brackets that are open

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield each JSON value that is now complete, and a WireError in the place of each that is none."""
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
        """Go on to the end of the message."""
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
        """Outside of every message: pass blanks, then see what comes."""
        blank = _BLANK.match(self._buffer)
        del self._buffer[: blank.end() if blank else 0]
        self._at = 0
        if not self._buffer:
            return _MORE
        word = _WORD.match(self._buffer)
        self._at = word.end() if word else 0
        if self._at:
            # A word cut in two by the network is two errors; nothing that is a message begins with one.
            return self._end()
        return self._structural()

    def _to_bracket(self) -> Any:  # noqa: ANN401 - as `_begin`
        plain = _PLAIN.match(self._buffer, self._at)
        self._at = plain.end() if plain else self._at
        return _MORE if self._at == len(self._buffer) else self._structural()

    def _structural(self) -> Any:  # noqa: ANN401 - as `_begin`
        """A bracket, a quote, or what may not be here."""
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
            # A control character is looked at again: it may be the line's end.
            self._at += byte == _RESET
            return self._fail("invalid character in string")
        self._at += 1
        self._in_string = False
        return None if self._open else self._end()

    def _end(self) -> Any:  # noqa: ANN401 - as `_begin`
        """A message is complete, up to `_at`."""
        text = bytes(self._buffer[: self._at])
        skipped = self._skipping
        self._forget()
        return None if skipped else _decoded(text)

    def _fail(self, reason: str) -> WireError | None:
        skipped = self._skipping
        self._forget()
        return None if skipped else WireError(f"JSON parse error, {reason}")

    def _forget(self) -> None:
        """Drop what was looked at and begin anew."""
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
        # JSONDecodeError, what the two hooks raise, and integers of thousands of digits.
        return WireError(f"JSON parse error, {exc}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _no_constant(name: str) -> Any:  # noqa: ANN401 - the signature that json wants
    raise ValueError(f"invalid keyword '{name}'")


def encode(message: object) -> bytes:
    """One message as a line: pure ASCII, so no cut and no lone surrogate of an echoed id can break it; CRLF as QEMU."""
    return json.dumps(message).encode("ascii") + b"\r\n"
