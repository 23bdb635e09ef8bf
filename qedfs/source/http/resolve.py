"""Resolves the URL that the user named: follows redirects to the server that has the file, and learns its identity.

Owns the first request and the rules for redirects: at most MAX_REDIRECTS, each target allowed by the policy, no loops,
never from https to http, with the cookies that are set on the way. Must not know reads, pools or earlier resolutions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from urllib.parse import urlsplit

import trio

from qedfs.errors import Reason, SourceError, SourceUnreachable
from qedfs.source.base import Identity
from qedfs.source.http.answer import Answer
from qedfs.source.http.digests import published_digest
from qedfs.source.http.exchange import Exchange
from qedfs.source.http.judge import (
    ALL,
    OPENING_BYTES,
    Part,
    RangeIgnored,
    hides_size,
    ignores_ranges,
    judge_opening,
    media_type,
)
from qedfs.source.http.multi import Multi
from qedfs.source.http.route import as_transient
from qedfs.source.http.target import Target, next_target
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.policy import Policy

MAX_REDIRECTS = 5
IGNORED_SECONDS = 1.0  # pause before a retry, if a range request was answered with the whole file
_TEMPORARY = frozenset({302, 303, 307})  # RFC 9110, section 15.4: the next request may be redirected elsewhere
REDIRECTS = frozenset({301, 308}) | _TEMPORARY

# nginx sends a 400, after a successful handshake, to a client that has no certificate or a wrong one.
_BAD_REQUEST = {
    False: "answered with status 400; it may want a client certificate (see --credentials)",
    True: "answered with status 400; it may not accept our client certificate",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """The target that has the file, the file's identity, and the cookies that were set on the way.

    `opening`: the first OPENING_BYTES of the file, or nothing if it is shorter or the server did not send just these.
    `media_type`: what the server calls the file, "" if it does not.
    """

    target: Target
    identity: Identity
    cookies: tuple[bytes, ...] = dataclasses.field(repr=False)
    opening: bytes = dataclasses.field(default=b"", repr=False)
    media_type: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class _Opening:
    """The answer to the first request, the bytes of the file in it, and the answer to HEAD if that was needed."""

    answer: Answer
    body: bytes
    head: Answer | None = None


async def resolve(
    origin: Target, exchange: Exchange, multi: Multi, policy: Policy, silent_seconds: float, pinning: Pinning = USUAL
) -> Resolved:
    """Request the first bytes of the file from `origin`, follow redirects, and learn size, validators and final URL.

    The request is a GET of some bytes, not a HEAD: some servers refuse HEAD, signed URLs are valid for one method only,
    and a HEAD would not show whether ranges work. A mirror is abandoned after `silent_seconds` without an answer.

    Raises:
        Refused: the policy forbids a location or its address.
        SourceUnreachable, SourceError: no usable answer, too many redirects, or a loop. After a temporary redirect,
            every error is transient, because the target may be one of many mirrors.
    """
    target = origin
    at_mirror = False
    digest: str | None = None
    exchange.take_cookies()
    seen = {(origin.url, exchange.cookies)}
    for _hop in range(MAX_REDIRECTS + 1):
        target.check_literal(policy)
        where = place_name(origin, target)
        with as_transient(at_mirror):
            with _in_time(where, silent_seconds if at_mirror else math.inf):
                asked = await _ask(target, exchange, multi, where)
            answer = asked.answer
            _explain_refusal(answer.status, target, where)
            if answer.status not in REDIRECTS:
                found = judge_opening(answer, where, str(target.location), pinning, head=asked.head)
                # A digest in the redirect is the digest of the file (RFC 6249, section 6).
                told = dataclasses.replace(found, digest=found.digest or digest, place=target.place)
                return Resolved(target, pinning.counted(told), exchange.cookies, asked.body, media_type(answer))
        digest = published_digest(answer) or digest
        at_mirror |= answer.status in _TEMPORARY
        following = _follow(origin, target, answer, exchange.peer_address())
        policy.check_redirect(target.location, following.location)
        # With a new cookie, the same URL may give another answer.
        if (following.url, exchange.cookies) in seen:
            raise SourceError(f"{origin.location} redirects in a loop")
        seen.add((following.url, exchange.cookies))
        target = following
    raise SourceError(f"{origin.location} redirects more than {MAX_REDIRECTS} times")


def _explain_refusal(status: int, target: Target, where: str) -> None:
    """Raise SourceError for a status that tells more if one knows what was asked, and how."""
    if status == 400 and target.location.tls:
        raise SourceError(f"{where} {_BAD_REQUEST[target.tls.certificate is not None]}")
    if status == 401 and (target.user is not None or target.headers):
        what = "user name and password" if target.user is not None else "header fields of --credentials"
        raise SourceError(f"{where} does not accept the {what} (401); check them in the URL, ~/.netrc or --credentials")
    if status == 407 and target.proxy:
        raise SourceError(
            f"{where}: the proxy {target.proxy_name} asks for a user name and a password (407);"
            " give them in the proxy's URL: http_proxy=http://USER:PASSWORD@HOST:PORT"
        )
    if status in (403, 404) and urlsplit(target.url).path.endswith("/"):
        refused = {403: "forbids access (403)", 404: "has nothing there (404)"}[status]
        raise SourceError(f"{where} {refused}; a URL that ends in / names a folder: give that of a file in it")


def place_name(origin: Target, target: Target) -> str:
    """How messages name the target: by the origin, and by its own URL if it is another one."""
    return str(origin.location) if target is origin else f"{origin.location} (redirected to {target.location})"


@contextlib.contextmanager
def _in_time(where: str, silent_seconds: float) -> Iterator[None]:
    with trio.move_on_after(silent_seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise SourceUnreachable(f"{where}: no answer within {silent_seconds:g} s", reason=Reason.TIMEOUT)


async def _ask(target: Target, exchange: Exchange, multi: Multi, where: str) -> _Opening:
    """The answer to the first request, and to a HEAD request if the first answer hides the size."""
    exchange.aim(target, request_lines(target, None))
    try:
        found = await _ask_for_range(exchange, multi, where)
    except RangeIgnored:
        # The answer may come from a cache that is just being filled.
        await trio.sleep(IGNORED_SECONDS)
        try:
            found = await _ask_for_range(exchange, multi, where)
        except RangeIgnored as exc:
            raise ignores_ranges(where, exc.media_type) from exc
    if not hides_size(found.answer):
        return found
    return dataclasses.replace(found, head=await _ask_for_head(exchange, multi, where))


async def _ask_for_range(exchange: Exchange, multi: Multi, where: str) -> _Opening:
    answers: list[Answer] = []
    body = bytearray(OPENING_BYTES)
    filled = False

    def keep(answer: Answer) -> Part | None:
        nonlocal filled
        answers.append(answer)
        if answer.status not in (200, 206) or hides_size(answer):
            return None
        found = judge_opening(answer, where, "")  # refuse a bad answer before its body is read
        filled = answer.status == 206 and found.size >= OPENING_BYTES
        return ALL if filled else None

    # Not on a warm connection: the address is checked when connecting, and the rule depends on the redirect.
    await exchange.run(multi, 0, memoryview(body), keep, where, fresh=True)
    return _Opening(answers[0], bytes(body) if filled else b"")


async def _ask_for_head(exchange: Exchange, multi: Multi, where: str) -> Answer:
    answers: list[Answer] = []

    def keep(answer: Answer) -> Part:
        answers.append(answer)
        return ALL

    await exchange.head(multi, keep, where)
    return answers[0]


def _follow(origin: Target, target: Target, answer: Answer, address: str | None) -> Target:
    try:
        reference = answer.sole("location")
    except ValueError as exc:
        raise SourceError(f"{target.location} redirects to several URLs at once") from exc
    if reference is None:
        raise SourceError(f"{target.location} redirects (status {answer.status}) without saying where")
    return next_target(origin, target, reference, address)


def request_lines(target: Target, pinned: Identity | None) -> tuple[str, ...]:
    """The header lines of a request to `target`. If a version is pinned, they make the request conditional on it.

    Without a strong ETag, the condition is If-Unmodified-Since with the server's own date. That does no harm: the same
    version has the same date, and a server that does not understand the field ignores it (RFC 9110, section 13.1.4).
    It does not detect a replacement by a file with an older date, but the judge compares the date as well.
    """
    lines = ["Accept-Encoding: identity", *target.headers]
    if pinned is not None and pinned.strong_etag is not None:
        lines.append(f"If-Match: {pinned.strong_etag}")
    elif pinned is not None and pinned.last_modified is not None:
        lines.append(f"If-Unmodified-Since: {pinned.last_modified}")
    return tuple(lines)
