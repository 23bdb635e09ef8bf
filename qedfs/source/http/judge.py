"""The validation of HTTP answers: from status and header alone, decides whether the body may be used.

Pure: no I/O, no clock. Owns every rule by which status and header are accepted or refused, the class of the error for a
refusal, and which part of a body is the requested range. How long a body is, is checked in `exchange.py`. Must not know
libcurl, connections or redirects.

A wrong byte that is accepted here would stay in an overlay for ever. So an answer must be exactly the requested range
of exactly the pinned version; anything else is an error. There are three kinds of error: `SourceChanged` (another
version), `SourceUnreachable` (a fault of this answer or connection, a retry may help) and `SourceError` (a retry will
not help). Three exceptions leave a question to the caller: `Doubted`, whether the answer is of the pinned version;
`Unmet`, why the server considers our condition not met; and `RangeIgnored`, whether the server always sends the whole
file. Section numbers are those of RFC 9110.
"""

from __future__ import annotations

import dataclasses
import email.utils
import functools
import re
from collections.abc import Sequence
from datetime import datetime

from qedfs.errors import Reason, SourceChanged, SourceError, SourceUnreachable
from qedfs.source.base import Identity, Sameness
from qedfs.source.http.answer import Answer
from qedfs.source.http.digests import published_digest
from qedfs.source.pinning import USUAL, Pinning

MAX_SIZE = 2**63 - 1  # bytes; the largest file offset
# Size of the first request: a sector, which shows the format, and so saves a request. (One byte would not do anyway:
# busybox httpd treats `bytes=0-0` as `bytes=0-`.)
OPENING_BYTES = 512
# Up to this file size, an answer with the whole file is accepted and the range cut out of it, which makes a seed ISO on
# a server without ranges usable.
SMALL_FILE_BYTES = 512 << 10
MAX_RETRY_AFTER_SECONDS = 60.0  # a longer Retry-After is cut to this, because a reader is waiting
MAX_VALIDATOR_CHARS = 1024  # an ETag is sent back to the server in each request
MAX_DATE_CHARS = 64  # the longest form that section 5.6.7 allows has 33

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII | re.IGNORECASE)
_UNSATISFIED_RANGE = re.compile(r"bytes \*/([0-9]{1,19})", re.ASCII | re.IGNORECASE)
_ETAG = re.compile('(W/)?"[!#-~\x80-\xff]*"')  # section 8.8.3
_PLAIN = frozenset({"", "identity", "none", "aws-chunked"})  # codings that leave the body unchanged; the last is S3's
_DIGITS = re.compile(r"[0-9]{1,19}", re.ASCII)

# Sections 15.5 and 15.6, and RFC 6585: the client may repeat the same request later.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_MEANING = {
    401: "asks for a user name and a password (401); put them into ~/.netrc, or a token into a --credentials file",
    403: "forbids access (403); it may want a login or a token (~/.netrc, --credentials), or a signed URL has expired",
    404: "has no such file (404)",
    407: "is behind a proxy that asks for credentials (407)",
    410: "no longer has the file (410)",
    416: "has no such range (416)",
    429: "got too many requests (429)",
    503: "is overloaded (503)",
}


class Doubted(Exception):
    """The answer may be of another version. `shown`: the identity in it; `why`: the evidence against our version.

    Never leaves this package.
    """

    def __init__(self, shown: Identity, why: str) -> None:
        super().__init__(why)
        self.shown = shown
        self.why = why


class Unmet(Exception):
    """412: the server says that the condition of the request is not met. Never leaves this package."""


class RangeIgnored(Exception):
    """200 with the whole file, and the file is not small. `media_type`: see there. Never leaves this package."""

    def __init__(self, media_type: str = "") -> None:
        super().__init__(media_type)
        self.media_type = media_type


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Where the range is in a body: how many bytes of the body to skip `before` and `after` it."""

    before: int = 0
    after: int = 0


ALL = Part()


@dataclasses.dataclass(frozen=True, slots=True)
class RangeRequest:
    """A range request: `size` bytes at `pos` of the version `identity`. `where` names the source in messages.

    `also`: other identities that were proved to stand for that version. `conditional`: the request had the version as a
    condition.
    """

    pos: int
    size: int
    identity: Identity
    where: str
    also: Sequence[Identity] = ()
    pinning: Pinning = USUAL
    conditional: bool = True
    place: str = ""  # see `Identity`


def judge_range(answer: Answer, request: RangeRequest) -> tuple[Identity, Part]:
    """Check that the body of `answer` holds exactly the requested range. The caller must still count the body's bytes.

    Returns the requested version, completed with what the answer adds to it, and where the range is in the body: a
    server may send the whole file instead (section 14.2).

    Raises:
        SourceChanged: another version: its total size, digest, ETag or Last-Modified differs.
        Doubted, Unmet, RangeIgnored: see there.
        SourceUnreachable: wrong or garbled range, wrong length, multipart, or a transient status.
        SourceError: encoded content, or a permanent status.
    """
    try:
        if answer.status == 206:
            return _judge_partial(answer, request), ALL
        if answer.status == 200:
            return _judge_whole(answer, request)
    except ValueError as exc:
        raise SourceUnreachable(
            f"{request.where}: answer to a range request refused: {exc}", reason=Reason.ANSWER
        ) from exc
    if answer.status == 412 and request.conditional:
        raise Unmet
    if answer.status == 416:
        _compare_unsatisfied(answer, request)
    raise refused_status(answer, request.where)


def judge_opening(
    answer: Answer, where: str, name: str, pinning: Pinning = USUAL, *, head: Answer | None = None
) -> Identity:
    """The identity in the answer to the first request, which was for OPENING_BYTES, reduced to what `pinning` counts.

    416 with `bytes */0` and 200 with `Content-Length: 0` mean an empty file, of which no range exists (section 14.4).
    `name` becomes `Identity.name`. `head`: the answer to a HEAD request, needed if the first answer `hides_size`.

    Raises:
        RangeIgnored: see there.
        SourceUnreachable, SourceError: as `judge_range`; also if the server does not report the size.
    """
    try:
        if answer.status == 206:
            size = _opening_size(answer, where, head)
        elif answer.status == 200:
            size = _whole_size(answer, where)
        elif answer.status == 416 and _unsatisfied_total(answer) == 0:
            size = 0
        else:
            raise refused_status(answer, where)
        return pinning.counted(Identity(size, *_validators(answer), name, published_digest(answer)))
    except ValueError as exc:
        raise SourceUnreachable(f"{where}: answer to the first request refused: {exc}", reason=Reason.ANSWER) from exc


def hides_size(answer: Answer) -> bool:
    """Whether the answer is a part of a file but does not report the file's size."""
    return answer.status == 206 and any(
        value.strip().endswith("/*") for value in answer.fields.get("content-range", ())
    )


def ignores_ranges(where: str, media_type: str = "") -> SourceError:
    """The error for a server that always sends the whole file, of this `media_type`."""
    if media_type == "text/html":
        return SourceError(
            f"{where} ignores range requests and answers with a web page (text/html); see in a browser whether it is a"
            " login (put user name and password into ~/.netrc) or a list of files (give the URL of one of them)"
        )
    return SourceError(
        f"{where} ignores range requests (answered 200 with the whole file);"
        " put the file on a server that supports ranges (nginx, Apache, Caddy, lighttpd; not `python -m http.server`),"
        " or download it and use the local copy"
    )


def media_type(answer: Answer) -> str:
    """The media type of the body, in lower case and without parameters; "" if the server sends none or several."""
    values = answer.fields.get("content-type", ())
    return values[0].partition(";")[0].strip().lower() if len(values) == 1 else ""


def refused_status(answer: Answer, where: str) -> SourceError:
    """The error for a status that comes without bytes of the file."""
    status = answer.status
    meaning = _MEANING.get(status, f"answered with status {status}")
    # Section 15: an unknown 5xx counts as 500. 501 and 505 are permanent.
    if status in _TRANSIENT or (status > 500 and status not in (501, 505)):
        return SourceUnreachable(f"{where} {meaning}", reason=Reason.SERVER, retry_after_seconds=_retry_after(answer))
    return SourceError(f"{where} {meaning}")


@functools.lru_cache(maxsize=64)  # each answer has a date, usually the same one
def is_http_date(text: str) -> bool:
    """Whether `text` is an HTTP date (section 5.6.7), so that it can be sent back in If-Unmodified-Since."""
    return _http_date(text) is not None


def _judge_partial(answer: Answer, request: RangeRequest) -> Identity:
    _refuse_encoded(answer, request.where)
    start, end, total = _content_range(answer)
    if total is not None and total != request.identity.size:
        raise SourceChanged(f"{request.where}: size was {request.identity.size}, is now {total}")
    identity = _judge_version(answer, request)
    if total is None and not (any(identity.validators) or identity.digest):
        raise ValueError("neither total size nor ETag nor date")
    if (start, end) != (request.pos, request.pos + request.size - 1):
        raise ValueError(f"asked for {request.pos}-{request.pos + request.size - 1}, got {start}-{end}")
    _check_length(answer, request.size)
    return identity


def _judge_whole(answer: Answer, request: RangeRequest) -> tuple[Identity, Part]:
    """Judge an answer with the whole file instead of a range. Its length and version must be those of the request."""
    # The version first: if both are wrong, the changed version is the better error.
    identity = _judge_version(answer, request)
    part = Part(request.pos, identity.size - request.pos - request.size)
    if part != ALL and identity.size > SMALL_FILE_BYTES:
        raise RangeIgnored(media_type(answer))
    _refuse_encoded(answer, request.where)
    _refuse_range(answer)
    _check_length(answer, identity.size)
    return identity, part


def _opening_size(answer: Answer, where: str, head: Answer | None) -> int:
    _refuse_encoded(answer, where)
    start, end, total = _content_range(answer)
    if total is None:
        total = _hidden_size(answer, where, head)
    if not 1 <= total <= MAX_SIZE or (start, end) != (0, min(OPENING_BYTES, total) - 1):
        raise ValueError(f"asked for 0-{OPENING_BYTES - 1}, got {start}-{end}/{total}")
    _check_length(answer, end + 1)
    return total


def _hidden_size(answer: Answer, where: str, head: Answer | None) -> int:
    """The size from the answer to HEAD, which must be of the same version."""
    hidden = f"{where} does not report the size of the file (Content-Range ends in /*)"
    told = Identity(0, *_validators(answer))
    if not any(told.validators):
        raise SourceError(f"{hidden}, nor any validator of its version")
    if head is None or head.status != 200 or not head.fields.get("content-length"):
        raise SourceError(f"{hidden}, and HEAD does not report it either")
    _refuse_encoded(head, where)
    if not told.tells_as(Identity(0, *_validators(head))):
        raise ValueError("HEAD reports another version than GET")
    return _length(head) or 0


def _refuse_range(answer: Answer) -> None:
    if answer.fields.get("content-range"):
        raise ValueError("Content-Range in an answer with the whole file")


def _whole_size(answer: Answer, where: str) -> int:
    _refuse_encoded(answer, where)
    _refuse_range(answer)
    size = _length(answer)
    if size is None or size > SMALL_FILE_BYTES:
        raise RangeIgnored(media_type(answer))
    return size


def _content_range(answer: Answer) -> tuple[int, int, int | None]:
    values = answer.fields.get("content-range", ())
    if len(values) != 1:
        raise ValueError("no Content-Range" if not values else "more than one Content-Range")
    found = _CONTENT_RANGE.fullmatch(values[0])
    if found is None:
        raise ValueError("garbled Content-Range")
    return int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])


def _refuse_encoded(answer: Answer, where: str) -> None:
    """Refuse a body that is not the plain bytes of one range."""
    for codings in answer.fields.get("content-encoding", ()):
        if any(coding.strip().lower() not in _PLAIN for coding in codings.split(",")):
            raise SourceError(f"{where} encodes its answers (Content-Encoding) although identity was asked for")
    for coding in answer.fields.get("transfer-encoding", ()):
        if coding.lower() not in ("", "identity", "chunked"):
            raise SourceError(f"{where} encodes its answers (Transfer-Encoding) although nobody asked for it")
    for kind in answer.fields.get("content-type", ()):
        if kind.lower().startswith("multipart/byteranges"):
            raise ValueError("several ranges (multipart/byteranges)")


def _check_length(answer: Answer, size: int) -> None:
    length = _length(answer)
    if length is not None and length != size:
        raise ValueError(f"Content-Length {length} for a range of {size} bytes")


def _length(answer: Answer) -> int | None:
    """The Content-Length, if there is one (section 8.6: a repeated one must be the same)."""
    length = answer.sole("content-length")
    if length is not None and _DIGITS.fullmatch(length) is None:
        raise ValueError("garbled Content-Length")
    return None if length is None else int(length)


def _judge_version(answer: Answer, request: RangeRequest) -> Identity:
    """The requested version, completed with what the answer adds to it.

    Validators are compared as text, because a server sends the same text for the same version.
    """
    identity, place = request.identity, request.place or request.identity.place
    validators, digest = _validators(answer), published_digest(answer)
    if (validators, digest, place) == (identity.validators, identity.digest, identity.place):
        return identity  # nearly always
    shown = request.pinning.counted(Identity(identity.size, *validators, identity.name, digest, place))
    verdict = identity.compare(shown)
    if verdict.sameness is Sameness.SAME or identity.tells_as(shown):
        return identity.joined(shown)
    if any(known.compare(shown).sameness is Sameness.SAME or known.tells_as(shown) for known in request.also):
        return identity
    if verdict.sameness is Sameness.CHANGED:
        raise SourceChanged(f"{request.where}: {verdict.why}")
    raise Doubted(shown, verdict.why)


def _compare_unsatisfied(answer: Answer, request: RangeRequest) -> None:
    total = _unsatisfied_total(answer)
    if total is not None and total != request.identity.size:
        raise SourceChanged(f"{request.where}: size was {request.identity.size}, is now {total}")


def _unsatisfied_total(answer: Answer) -> int | None:
    values = answer.fields.get("content-range", ())
    found = _UNSATISFIED_RANGE.fullmatch(values[0]) if len(values) == 1 else None
    return int(found[1]) if found else None


def _validators(answer: Answer) -> tuple[str | None, str | None]:
    return _usable(answer.sole("etag"), answer.sole("last-modified"))


# Parsing a date takes 15 us, and the answers of one source repeat the same few validators.
@functools.lru_cache(maxsize=256)
def _usable(etag: str | None, last_modified: str | None) -> tuple[str | None, str | None]:
    if etag is not None and (_ETAG.fullmatch(etag) is None or len(etag) > MAX_VALIDATOR_CHARS):
        etag = None
    if last_modified is not None and (len(last_modified) > MAX_DATE_CHARS or not is_http_date(last_modified)):
        last_modified = None
    return etag, last_modified


def _retry_after(answer: Answer) -> float | None:
    """The Retry-After in seconds (section 10.2.3), capped; None if absent or garbled.

    A date is taken relative to the server's own Date, so that a wrong clock here does not matter.
    """
    values = answer.fields.get("retry-after", ())
    if len(values) != 1:
        return None
    if _DIGITS.fullmatch(values[0]):
        return min(float(values[0]), MAX_RETRY_AFTER_SECONDS)
    then = _http_date(values[0])
    now = next((_http_date(date) for date in answer.fields.get("date", ())), None)
    if then is None or now is None:
        return None
    return min(max(0.0, (then - now).total_seconds()), MAX_RETRY_AFTER_SECONDS)


def _http_date(text: str) -> datetime | None:
    if not text.isascii() or not text.endswith(" GMT"):
        return None
    try:
        return email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
