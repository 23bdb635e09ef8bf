"""Header lines become an Answer or the declared error, whatever they hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfs.errors import QedfsError, SourceUnreachable
from qedfs.source.base import Identity
from qedfs.source.http.answer import Answer, parse_answer
from qedfs.source.http.judge import Doubted, RangeIgnored, RangeRequest, Unmet, judge_opening, judge_range

STATUS = b"HTTP/1.1 206 Partial Content\r\n"


def test_fields_are_trimmed_lower_case_and_kept_when_repeated() -> None:
    lines = [STATUS, b'ETag:\t "a" \r\n', b"VARY: x\r\n", b"vary: y\n", b"Empty:\r\n", b"X: \xe9\r\n"]
    answer = parse_answer(lines, "here")
    assert answer == Answer(206, {"etag": ['"a"'], "vary": ["x", "y"], "empty": [""], "x": ["\xe9"]})


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"\r\n"],
        [b"HTTP/2 206\r\n"],
        [b"HTTP/1.1 2060 Partial\r\n"],
        [b"HTTP/1.1  206 Partial\r\n"],
        [b"ICY 200 OK\r\n"],
        [STATUS, b"no colon\r\n"],
        [STATUS, b" folded: yes\r\n"],
        [STATUS, b"space before : colon\r\n"],
        [STATUS, b": no name\r\n"],
        [STATUS, b"Nul: a\0b\r\n"],
        [STATUS, b"Return: a\rb\r\n"],
    ],
)
def test_garbled_lines_are_refused(lines: list[bytes]) -> None:
    with pytest.raises(SourceUnreachable, match="here"):
        parse_answer(lines, "here")


def test_sole_tells_a_repeated_field_with_one_value_from_a_contradiction() -> None:
    answer = Answer(200, {"same": ["a", "a"], "other": ["a", "b"]})
    assert answer.sole("same") == "a"
    assert answer.sole("absent") is None
    with pytest.raises(ValueError, match="several different other fields"):
        answer.sole("other")


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_lines_are_parsed_or_refused(lines: list[bytes]) -> None:
    _parse_and_judge(lines)


NAMES = ("Content-Range", "Content-Length", "ETag", "Last-Modified", "Retry-After", "Date", "Content-Encoding", "X")
VALUES = ("bytes 0-1/9", "bytes 0-8/9", "bytes */9", "1", "9", '"a"', 'W/"a"', "Mon, 01 Jan 2024 00:00:00 GMT", "gzip")


@given(
    st.integers(100, 599),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | st.text(max_size=30)), max_size=8),
)
def test_any_likely_header_is_judged_or_refused(status: int, fields: list[tuple[str, str]]) -> None:
    lines = [f"HTTP/1.1 {status} X\r\n".encode()]
    lines += [f"{name}: {value}\r\n".encode("utf-8", "surrogatepass") for name, value in fields]
    _parse_and_judge(lines)


def _parse_and_judge(lines: list[bytes]) -> None:
    try:
        answer = parse_answer(lines, "here")
    except SourceUnreachable:
        return
    request = RangeRequest(0, 9, Identity(9, '"a"', None), "here")
    judges: tuple[Callable[[], object], ...] = (
        lambda: judge_range(answer, request),
        lambda: judge_opening(answer, "here", "name"),
    )
    for judge in judges:
        try:
            judge()
        except (QedfsError, Doubted, Unmet, RangeIgnored):
            continue
        # What is accepted says in so many words that it is the right range.
        assert answer.status in (200, 206, 416)
        ranges = answer.fields.get("content-range", [])
        assert [value.lower() for value in ranges] in ([], ["bytes 0-8/9"], ["bytes */0"], ["bytes 0-0/1"]) or (
            ranges[0].lower().startswith(("bytes 0-1/", "bytes 0-8/*"))
        )
