"""Messages are found whatever the network does to them, and garbage costs no more than an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.control.qmp.wire import MAX_DEPTH, Reader, WireError, encode

# Thousands of rounds through code that other tests cover: a tracer would double their time.
pytestmark = pytest.mark.no_cover


def read(*pieces: bytes, max_bytes: int = 1 << 20) -> list[Any]:
    """Everything that comes of these pieces; a WireError as its text."""
    reader = Reader(max_bytes)
    found = [message for piece in pieces for message in reader.feed(piece)]
    return [str(message) if isinstance(message, WireError) else message for message in found]


CASES = [
    (b'{"execute":"quit"}', [{"execute": "quit"}]),
    (b'{"a":1}{"b":2}', [{"a": 1}, {"b": 2}]),
    (b' \r\n\t{"a":1}\r\n{"b":2} ', [{"a": 1}, {"b": 2}]),
    (b'{"a":"}]{[\\"\\\\"}{"b":[{"c":"\\u00e4"}]}', [{"a": '}]{["\\'}, {"b": [{"c": "\u00e4"}]}]),
    ('{"a":"\u00e4\u20ac"}'.encode(), [{"a": "\u00e4\u20ac"}]),
    (b'[1,2]"text"', [[1, 2], "text"]),
    (b'{"a":', []),
    (b"", []),
    (b'{"a":1\xff{"b":2}', ["JSON parse error, the message was cut off", {"b": 2}]),
    (b'{"a":"x\xff{"b":2}', ["JSON parse error, invalid character in string", {"b": 2}]),
    (b'"lone quote\n{"b":2}', ["JSON parse error, invalid character in string", {"b": 2}]),
    (b'}{"b":2}', ["JSON parse error, unexpected '}'", {"b": 2}]),
    (b'{]{"b":2}', ["JSON parse error, unexpected ']'", {"b": 2}]),
    (b'{"a":1,"a":2}', ["JSON parse error, duplicate key"]),
    (b'{"a":NaN}', ["JSON parse error, invalid keyword 'NaN'"]),
    (b'{"a":"\xc3("}{"b":2}', ["JSON parse error, invalid UTF-8 sequence in string", {"b": 2}]),
    (b"\x00", ["JSON parse error, stray control character"]),
]


@pytest.mark.parametrize(("data", "expected"), CASES)
def test_messages_whole(data: bytes, expected: list[Any]) -> None:
    assert read(data) == expected


@pytest.mark.parametrize(("data", "expected"), CASES)
def test_messages_byte_by_byte(data: bytes, expected: list[Any]) -> None:
    assert read(*(data[i : i + 1] for i in range(len(data)))) == expected


@pytest.mark.parametrize(("data", "expected"), CASES)
def test_messages_before_another(data: bytes, expected: list[Any]) -> None:
    if data == b'{"a":':
        data, expected = data + b"1}", [{"a": 1}]
    assert read(data, b'\n{"last":true}') == [*expected, {"last": True}]


@pytest.mark.parametrize("word", [b"hello", b"{'a':1}", b"{a:1}", b'{"a" 1}', b"GET / HTTP/1.1"])
def test_words_are_errors_and_the_next_line_is_read(word: bytes) -> None:
    *errors, last = read(word + b'\n{"b":2}')
    assert last == {"b": 2}
    assert errors
    assert all(error.startswith("JSON parse error") for error in errors)


def test_depth_is_bounded() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert len(read(deepest)) == 1
    errors = read(b'{"a":' + b"[" * MAX_DEPTH + b"\n")
    assert errors == ["JSON parse error, nesting depth limit exceeded"]


def test_a_million_brackets_do_no_harm() -> None:
    assert all(isinstance(error, str) for error in read(b"[" * 1_000_000))


def test_integers_of_any_length_do_no_harm() -> None:
    assert isinstance(read(b"[" + b"1" * 100_000 + b"]")[0], str)


def test_a_message_too_large_is_one_error_and_the_next_is_read() -> None:
    large = json.dumps({"a": "x" * 5000, "b": ['"', "}"]}).encode()
    pieces = [large[i : i + 100] for i in range(0, len(large), 100)]
    assert read(*pieces, b'{"b":2}', max_bytes=1000) == ["JSON message size limit exceeded", {"b": 2}]


def test_what_is_passed_over_is_not_kept() -> None:
    reader = Reader(1000)
    list(reader.feed(b'{"a":"'))
    for _ in range(100):
        list(reader.feed(b"x" * 1000))
    assert len(reader._buffer) <= 2000


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), max_size=4), st.data())
def test_any_messages_cut_anywhere(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    ascii_only = data.draw(st.booleans())
    text = "".join(json.dumps(message, ensure_ascii=ascii_only) for message in messages)
    stream = text.encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(*pieces) == messages


@given(st.binary(max_size=200))
def test_any_bytes_end_in_messages_or_errors_and_a_reset_recovers(data: bytes) -> None:
    found = read(data, b'\xff\n{"last":true}')
    assert found[-1] == {"last": True}


@given(JSON_VALUES)
def test_a_line_is_one_line_of_ascii(value: Any) -> None:
    line = encode(value)
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert json.loads(line) == value
