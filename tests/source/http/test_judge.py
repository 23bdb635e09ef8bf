"""The table of answers, and which class of error each one is."""

from __future__ import annotations

import dataclasses
import re

import pytest

from qedfs.errors import QedfsError, SourceChanged, SourceError, SourceUnreachable
from qedfs.source.base import Identity
from qedfs.source.http.answer import Answer
from qedfs.source.http.judge import (
    MAX_VALIDATOR_CHARS,
    Doubted,
    Part,
    RangeIgnored,
    RangeRequest,
    Unmet,
    hides_size,
    ignores_ranges,
    is_http_date,
    judge_opening,
    judge_range,
)

DATE = "Mon, 01 Jan 2024 00:00:00 GMT"
LATER = "Tue, 02 Jan 2024 00:00:00 GMT"
PINNED = Identity(1000, '"v1"', DATE)
DATED = Identity(1000, None, DATE)
WEAK = Identity(1000, 'W/"v1"')
BARE = Identity(1000)

GOOD = {"Content-Range": "bytes 100-199/1000", "Content-Length": "100", "ETag": '"v1"', "Last-Modified": DATE}


def answer(status: int = 206, /, **changes: str | list[str] | None) -> Answer:
    """The right answer with some fields changed (`_` for `-`); None takes a field away, a list repeats it."""
    fields = {name.lower(): [value] for name, value in GOOD.items()}
    for name, value in changes.items():
        key = name.replace("_", "-").lower()
        fields.pop(key, None)
        if value is not None:
            fields[key] = value if isinstance(value, list) else [value]
    return Answer(status, fields)


def verdict(given: Answer, pinned: Identity = PINNED) -> type[QedfsError] | None:
    try:
        judge_range(given, RangeRequest(100, 100, pinned, "here"))
    except QedfsError as exc:
        return type(exc)
    return None


@pytest.mark.parametrize(
    ("given", "pinned"),
    [
        (answer(), PINNED),
        (answer(Content_Length=None), PINNED),
        (answer(Content_Length=["100", "100"]), PINNED),
        (answer(Content_Range="Bytes 100-199/1000"), PINNED),
        (answer(Content_Encoding="identity"), PINNED),
        (answer(Transfer_Encoding="chunked", Content_Length=None), PINNED),
        (answer(Content_Type="application/octet-stream"), PINNED),
        # The ETag outranks the date.
        (answer(Last_Modified=LATER), PINNED),
        (answer(Last_Modified=None), PINNED),
        (answer(ETag='"v2"'), DATED),
        (answer(ETag=None, Last_Modified=None), BARE),
        (answer(ETag='W/"v1"', Last_Modified=None), WEAK),
        # And a digest the ETag.
        (answer(ETag='"v2"', X_Checksum_MD5="00" * 16), dataclasses.replace(PINNED, digest="md5:" + "00" * 16)),
    ],
)
def test_the_right_range_of_the_right_version_is_accepted(given: Answer, pinned: Identity) -> None:
    assert verdict(given, pinned) is None


@pytest.mark.parametrize(
    ("given", "pinned", "why"),
    [
        (answer(ETag=None, Last_Modified=None), PINNED, 'ETag was "v1", is now not told'),
        (answer(ETag=None), PINNED, 'ETag was "v1", is now not told'),
        (answer(ETag='W/"v1"'), PINNED, 'ETag was "v1", is now W/"v1"'),
        (answer(ETag="v1"), PINNED, 'ETag was "v1", is now not told'),
        (answer(Last_Modified=None), DATED, f"Last-Modified was {DATE}, is now not told"),
        (answer(), WEAK, 'ETag was W/"v1", is now "v1"'),
        # Nothing speaks against it, but nothing had been told before.
        (answer(ETag='"v2"', Last_Modified=LATER), BARE, ""),
        (answer(ETag='W/"v1"'), WEAK, ""),
    ],
)
def test_a_doubt_is_for_the_caller_to_prove(given: Answer, pinned: Identity, why: str) -> None:
    with pytest.raises(Doubted) as caught:
        judge_range(given, RangeRequest(100, 100, pinned, "here"))
    assert caught.value.why == why
    assert caught.value.shown.size == 1000
    # What has been proved before is no doubt any more.
    judge_range(given, RangeRequest(100, 100, pinned, "here", also=(caught.value.shown,)))


@pytest.mark.parametrize(
    "given",
    [
        answer(Content_Range="bytes 101-200/1000"),
        answer(Content_Range="bytes 0-99/1000"),
        answer(Content_Range="bytes 100-198/1000"),
        answer(Content_Range="bytes 100-200/1000"),
        answer(Content_Range="bytes 199-100/1000"),
        answer(Content_Range="bytes */1000"),
        answer(Content_Range="bytes 100-199"),
        answer(Content_Range="bytes=100-199/1000"),
        answer(Content_Range="bytes 100 - 199/1000"),
        answer(Content_Range="bytes 100-199/1000, bytes 0-9/1000"),
        answer(Content_Range="items 100-199/1000"),
        answer(Content_Range="bytes 1٠٠-199/1000"),
        answer(Content_Range="bytes 100-199/" + "9" * 30),
        answer(Content_Range="-1"),
        answer(Content_Range=""),
        answer(Content_Range=None),
        answer(Content_Range=["bytes 100-199/1000", "bytes 100-199/1000"]),
        answer(Content_Length="99"),
        answer(Content_Length="101"),
        answer(Content_Length="+100"),
        answer(Content_Length="100, 100"),
        answer(Content_Length=["100", "1000"]),
        answer(Content_Type="multipart/byteranges; boundary=x"),
        answer(Content_Type="Multipart/ByteRanges"),
        answer(ETag=['"v1"', '"v2"']),
        answer(200, ETag=['"v1"', '"v2"']),
        answer(200, ETag=None, Last_Modified=[DATE, LATER]),
        answer(408),
        answer(425),
        answer(429),
        answer(500),
        answer(502),
        answer(503),
        answer(504),
        answer(520),
    ],
)
def test_another_try_may_help(given: Answer) -> None:
    assert verdict(given) is SourceUnreachable


def test_without_the_total_the_version_has_to_tell() -> None:
    hidden = answer(Content_Range="bytes 100-199/*")
    assert verdict(hidden) is None
    assert verdict(answer(Content_Range="bytes 100-199/*", ETag='"v2"')) is SourceChanged
    assert verdict(answer(Content_Range="bytes 100-199/*", ETag=None, Last_Modified=None), BARE) is SourceUnreachable


@pytest.mark.parametrize(
    "given",
    [
        answer(Content_Encoding="gzip"),
        answer(Content_Encoding="BR"),
        answer(Content_Encoding=["identity", "gzip"]),
        answer(Transfer_Encoding="gzip, chunked"),
        *(answer(status) for status in (201, 203, 204, 301, 302, 304, 400, 401, 403, 404, 407, 410, 416, 501, 505)),
    ],
)
def test_asking_again_will_not_help(given: Answer) -> None:
    assert verdict(given) is SourceError


@pytest.mark.parametrize(
    ("given", "pinned"),
    [
        (answer(Content_Range="bytes 100-199/1001"), PINNED),
        (answer(Content_Range="bytes 0-99/999"), BARE),
        (answer(ETag='"v2"'), PINNED),
        (answer(ETag='"v2"', Content_Range="bytes 0-99/1000"), PINNED),
        (answer(ETag=None, Last_Modified=LATER), PINNED),
        (answer(Last_Modified=LATER), DATED),
        (answer(200, ETag='"v2"'), PINNED),
        (answer(X_Checksum_MD5="01" * 16), dataclasses.replace(PINNED, digest="md5:" + "00" * 16)),
        (answer(ETag='W/"v2"'), WEAK),
        (answer(416, Content_Range="bytes */50"), PINNED),
    ],
)
def test_another_version_is_told_apart(given: Answer, pinned: Identity) -> None:
    assert verdict(given, pinned) is SourceChanged


def test_412_is_no_change_but_a_question() -> None:
    with pytest.raises(Unmet):
        judge_range(answer(412), RangeRequest(100, 100, PINNED, "here"))
    with pytest.raises(SourceError, match="answered with status 412"):
        judge_range(answer(412), RangeRequest(100, 100, BARE, "here", conditional=False))


def test_ignored_ranges_are_named_with_the_way_out() -> None:
    assert re.search(r"here ignores range requests .* download it", str(ignores_ranges("here")))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0),
        ("7", 7),
        ("60", 60),
        ("86400", 60),
        ("9" * 19, 60),
        ("9" * 20, None),
        ("-1", None),
        ("soon", None),
        (["1", "2"], None),
        ("Mon, 01 Jan 2024 00:00:30 GMT", 30),
        ("Mon, 01 Jan 2024 01:00:00 GMT", 60),
        ("Sun, 31 Dec 2023 23:59:00 GMT", 0),
        ("Mon, 99 Jan 2024 00:00:00 GMT", None),
    ],
)
def test_retry_after(value: str | list[str] | None, seconds: float | None) -> None:
    with pytest.raises(SourceUnreachable) as caught:
        judge_range(answer(503, Date=DATE, Retry_After=value), RangeRequest(100, 100, PINNED, "here"))
    assert caught.value.retry_after_seconds == seconds


def test_a_retry_date_without_the_servers_own_date_is_no_wish() -> None:
    with pytest.raises(SourceUnreachable) as caught:
        judge_range(answer(503, Retry_After=LATER), RangeRequest(100, 100, PINNED, "here"))
    assert caught.value.retry_after_seconds is None


OPENING = {"Content_Range": "bytes 0-511/1000", "Content_Length": "512"}
HIDDEN = {"Content_Range": "bytes 0-511/*", "Content_Length": "512"}


@pytest.mark.parametrize(
    ("given", "identity"),
    [
        (answer(**OPENING), Identity(1000, '"v1"', DATE, "name")),
        (answer(Content_Range="bytes 0-0/1", Content_Length=None), Identity(1, '"v1"', DATE, "name")),
        (answer(**OPENING, ETag='W/"v1"'), Identity(1000, 'W/"v1"', DATE, "name")),
        (
            answer(**OPENING, Last_Modified="Mon, 01 Jan 2024 00:00:00" + " " * 60 + " GMT"),
            Identity(1000, '"v1"', None, "name"),
        ),
        (answer(**OPENING, ETag="unquoted"), Identity(1000, None, DATE, "name")),
        (answer(**OPENING, ETag='"a b"'), Identity(1000, None, DATE, "name")),
        (answer(**OPENING, ETag='"' + "a" * MAX_VALIDATOR_CHARS + '"'), Identity(1000, None, DATE, "name")),
        (answer(**OPENING, ETag=None, Last_Modified="yesterday"), Identity(1000, None, None, "name")),
        (answer(416, Content_Range="bytes */0"), Identity(0, '"v1"', DATE, "name")),
        (answer(200, Content_Range=None, Content_Length="0"), Identity(0, '"v1"', DATE, "name")),
        # Two bytes, or a small file: the whole of it is as good as a part.
        (answer(200, Content_Range=None, Content_Length="2"), Identity(2, '"v1"', DATE, "name")),
        (answer(200, Content_Range=None, Content_Length=f"{512 << 10}"), Identity(512 << 10, '"v1"', DATE, "name")),
        (answer(**OPENING, Content_Encoding="aws-chunked"), Identity(1000, '"v1"', DATE, "name")),
        (answer(**OPENING, Content_Encoding="aws-chunked,"), Identity(1000, '"v1"', DATE, "name")),
        (answer(**OPENING, Content_Encoding="None"), Identity(1000, '"v1"', DATE, "name")),
    ],
)
def test_opening_shows_the_identity(given: Answer, identity: Identity) -> None:
    assert judge_opening(given, "here", "name") == identity


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (answer(200), SourceUnreachable, "Content-Range in an answer with the whole file"),
        (answer(**HIDDEN), SourceError, "does not report the size of the file .* and HEAD does not report it either"),
        (answer(**HIDDEN, ETag=None, Last_Modified=None), SourceError, "nor any validator"),
        (answer(**{**OPENING, "Content_Range": "bytes 0-0/0"}), SourceUnreachable, "got 0-0/0"),
        (answer(**{**OPENING, "Content_Range": "bytes 0-0/2"}), SourceUnreachable, "got 0-0/2"),
        (answer(**{**OPENING, "Content_Range": "bytes 1-2/1000"}), SourceUnreachable, "got 1-2/1000"),
        (answer(**{**OPENING, "Content_Range": "bytes 0-999/1000"}), SourceUnreachable, "got 0-999/1000"),
        (answer(**{**OPENING, "Content_Range": f"bytes 0-1/{2**63}"}), SourceUnreachable, "got 0-1"),
        (answer(**{**OPENING, "Content_Length": "1"}), SourceUnreachable, "Content-Length 1"),
        (answer(**OPENING, Content_Encoding="gzip"), SourceError, "Content-Encoding"),
        (answer(**OPENING, Content_Encoding="gzip, aws-chunked"), SourceError, "Content-Encoding"),
        (answer(200, Content_Range=None, Content_Length="9", Content_Encoding="gzip"), SourceError, "Content-Encoding"),
        (answer(**OPENING, ETag=['"a"', '"b"']), SourceUnreachable, "several different etag"),
        (answer(416, Content_Range="bytes */10"), SourceError, "no such range"),
        (answer(412), SourceError, "status 412"),
        (answer(404), SourceError, "no such file"),
        (answer(503), SourceUnreachable, "overloaded"),
    ],
)
def test_opening_refuses(given: Answer, error: type[QedfsError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        judge_opening(given, "here", "name")
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "given",
    [
        answer(200, Content_Range=None, Content_Length=f"{(512 << 10) + 1}"),
        answer(200, Content_Range=None, Content_Length=None),
    ],
)
def test_a_large_file_in_place_of_a_range_is_asked_for_once_more(given: Answer) -> None:
    with pytest.raises(RangeIgnored):
        judge_opening(given, "here", "name")


def test_a_size_that_only_head_tells() -> None:
    hidden, head = answer(**HIDDEN), answer(200, Content_Range=None, Content_Length="1000")
    assert hides_size(hidden)
    assert not hides_size(answer(**OPENING))
    assert judge_opening(hidden, "here", "name", head=head) == Identity(1000, '"v1"', DATE, "name")
    other = answer(200, Content_Range=None, Content_Length="1000", ETag='"v2"')
    with pytest.raises(SourceUnreachable, match="HEAD reports another version"):
        judge_opening(hidden, "here", "name", head=other)
    for useless in (answer(403), answer(200, Content_Range=None, Content_Length=None)):
        with pytest.raises(SourceError, match="HEAD does not report it either"):
            judge_opening(hidden, "here", "name", head=useless)


# The whole file in place of a range.


WHOLE = answer(200, Content_Range=None, Content_Length="1000")


@pytest.mark.parametrize(
    ("given", "pos", "size", "part"),
    [
        (WHOLE, 0, 1000, Part()),
        (answer(200, Content_Range=None, Content_Length=None), 0, 1000, Part()),
        (WHOLE, 0, 100, Part(0, 900)),
        (WHOLE, 100, 100, Part(100, 800)),
        (WHOLE, 900, 100, Part(900, 0)),
    ],
)
def test_the_range_is_cut_out_of_a_whole_file(given: Answer, pos: int, size: int, part: Part) -> None:
    assert judge_range(given, RangeRequest(pos, size, PINNED, "here")) == (PINNED, part)


def test_of_a_large_file_the_whole_is_taken_only_if_it_was_asked_for() -> None:
    large = 1 << 30
    given, pinned = answer(200, Content_Range=None, Content_Length=f"{large}"), dataclasses.replace(PINNED, size=large)
    assert judge_range(given, RangeRequest(0, large, pinned, "here")) == (pinned, Part())
    with pytest.raises(RangeIgnored):
        judge_range(given, RangeRequest(0, large - 1, pinned, "here"))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (answer(200, Content_Range=None, Content_Length="999"), SourceUnreachable),
        (answer(200, Content_Range=None, Content_Length="1001"), SourceUnreachable),
        (answer(200, Content_Range=None, Content_Length="1000", Content_Encoding="gzip"), SourceError),
        (answer(200, Content_Range=None, Content_Length="1000", ETag='"v2"'), SourceChanged),
        (answer(200, Content_Length="1000"), SourceUnreachable),
    ],
)
def test_a_whole_file_must_be_the_right_one(given: Answer, error: type[QedfsError]) -> None:
    for pos, size in ((0, 1000), (100, 100)):
        with pytest.raises(error) as caught:
            judge_range(given, RangeRequest(pos, size, PINNED, "here"))
        assert type(caught.value) is error


@pytest.mark.parametrize(
    ("text", "is_date"),
    [
        (DATE, True),
        ("Monday, 01-Jan-24 00:00:00 GMT", True),
        ("Mon, 01 Jan 2024 00:00:00 +0100", False),
        ("Mon, 01 Jan 2024 00:00:00", False),
        ("Mon, 32 Jan 2024 00:00:00 GMT", False),
        ("GMT", False),
        (" GMT", False),
        ("Mön, 01 Jan 2024 00:00:00 GMT", False),
        ("", False),
    ],
)
def test_http_dates(text: str, is_date: bool) -> None:
    assert is_http_date(text) is is_date
