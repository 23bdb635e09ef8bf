"""HttpSource: a `Source` over HTTP and HTTPS.

Owns the two connection pools and the current redirect target, which is resolved again when `route.py` says so. Must not
know what a valid answer looks like (`judge.py`), what identifies a version (`version.py`), how redirects are followed
(`resolve.py`) or how libcurl is driven (`multi.py`).

There are two pools, each with its own Multi. So urgent reads find a warm connection that no background read can take,
and a task of their own serves their sockets.

Concurrency. Any number of tasks may read. Only the task that holds `_resolving` replaces `_place`, as a whole; a reader
fetches it once per attempt. An Exchange belongs to one read between `pop` from and `append` to its pool's `_idle`.
`_Pool._slots` limits the transfers inside libcurl to the number of connections, because a transfer that waits inside
libcurl for a free connection would hit the time limit for connecting.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from functools import partial

import trio

from qedfs.errors import QedfsError, Reason, SourceChanged, SourceError, SourceUnreachable, UsageError
from qedfs.host.descriptors import connections
from qedfs.source.base import Extent, Identity, check_range
from qedfs.source.ca_files import read_files
from qedfs.source.credentials import NO_TLS_FILES, TlsFiles
from qedfs.source.http.answer import Answer
from qedfs.source.http.exchange import Exchange, Judge
from qedfs.source.http.judge import Doubted, Part, RangeIgnored, RangeRequest, Unmet, ignores_ranges
from qedfs.source.http.login import with_login
from qedfs.source.http.multi import Multi
from qedfs.source.http.resolve import IGNORED_SECONDS, REDIRECTS, Resolved, place_name, request_lines, resolve
from qedfs.source.http.route import Route, RouteHealth, as_transient
from qedfs.source.http.target import Target, first_target
from qedfs.source.http.version import Version
from qedfs.source.path import in_thread
from qedfs.source.pinning import USUAL, Pinning
from qedfs.source.policy import Policy
from qedfs.source.samples import Samples
from qedfs.source.url import Location

MAX_CONNECTIONS = 64  # per pool
DEADLINE_SECONDS = 30.0  # the default
MOST_ATTEMPTS = 4  # per read, to settle which version the server has; after that, the server contradicts itself

log = logging.getLogger(__name__)


class _Moved(Exception):
    """The target answers with a redirect now, so the origin has to be asked."""


class _Pool:
    """The connections for urgent or for background reads, and their idle handles."""

    def __init__(self, policy: Policy, nursery: trio.Nursery) -> None:
        most = connections()
        self._multi = Multi(nursery, max_connections=most)
        self._slots = trio.Semaphore(most)
        self._policy = policy
        self._idle: list[Exchange] = []
        self._busy: set[Exchange] = set()
        self._done = 0

    @property
    def received(self) -> int:
        return self._done + sum(exchange.received for exchange in self._busy)

    async def run(
        self, place: Route, pos: int, buffer: memoryview, judge: Judge, silence: trio.CancelScope, seconds: float
    ) -> None:
        """Run a request. `silence`, entered here, cancels it `seconds` after sending, unless `judge` prolongs it."""
        async with self._slots:
            exchange = self._idle.pop() if self._idle else Exchange(self._policy)
            self._busy.add(exchange)
            try:
                exchange.aim(place.target, place.lines, place.cookies)
                silence.deadline = trio.current_time() + seconds
                with silence:
                    await exchange.run(self._multi, pos, buffer, judge, place.where)
            finally:
                # Count the bytes of a failed or cancelled answer, too: they show that the source is alive.
                self._done += exchange.take_received()
                self._busy.discard(exchange)
                self._idle.append(exchange)

    def gather(self, seconds: float) -> None:
        """See `Gathers.gather`."""
        self._multi.gather(seconds)

    async def resolve(self, origin: Target, silent_seconds: float, pinning: Pinning) -> Resolved:
        exchange = Exchange(self._policy)
        try:
            return await resolve(origin, exchange, self._multi, self._policy, silent_seconds, pinning)
        finally:
            exchange.close()

    async def aclose(self) -> None:
        await self._multi.aclose()
        while self._idle:
            self._idle.pop().close()


class HttpSource:
    """A `Source` for the file at an http or https URL. Create it with `open`, end it with `aclose`."""

    def __init__(
        self,
        origin: Target,
        resolved: Resolved,
        urgent: _Pool,
        background: _Pool,
        health: RouteHealth,
        version: Version,
    ) -> None:
        self._origin = origin
        self._version = version
        self._urgent = urgent
        self._background = background
        self._resolving = trio.Lock()
        self._place = self._place_of(resolved)
        self._health = health
        self.opening = resolved.opening  # the first bytes of the file, see `Resolved`
        self.media_type = resolved.media_type

    @classmethod
    async def open(  # noqa: PLR0913 - what a user may say about a server
        cls,
        location: Location,
        policy: Policy,
        nursery: trio.Nursery,
        *,
        headers: Sequence[str] = (),
        tls: TlsFiles = NO_TLS_FILES,
        deadline_seconds: float = DEADLINE_SECONDS,
        pinning: Pinning = USUAL,
        samples: Samples | None = None,
    ) -> HttpSource:
        """Follow redirects to the file and learn its identity.

        `headers` are extra "Name: value" lines. `tls` holds the certificates for the origin. `deadline_seconds`: how
        long readers wait; while a redirect target fails, the origin is asked once per deadline. `samples`: taken from
        earlier reads of this version. They decide when the version is in doubt, and new reads add to them.

        Two tasks run in `nursery` until `aclose`. If the nursery ends before that, all reads raise SourceUnreachable.

        Raises:
            Refused: the policy forbids the location, an address, or a redirect.
            UsageError: the location is not http, or a header line is invalid.
            SourceUnreachable: no usable answer now.
            SourceError: a permanent refusal; the server ignores ranges; it does not report the size.
        """
        if location.kind != "http":
            raise UsageError(f"backing {location} is not an http or https URL")
        policy.check_location(location)
        if paths := tls.paths:
            await in_thread(paths[0], lambda: read_files(location, *paths))  # libcurl's error does not name the file
        origin = await with_login(first_target(location, headers, tls=tls))
        health = RouteHealth(deadline_seconds)
        pools: list[_Pool] = []
        try:
            pools.extend(_Pool(policy, nursery) for _ in range(2))
            # On the urgent pool: the connection stays open for the first urgent read.
            resolved = await pools[0].resolve(origin, health.at_opening_seconds, pinning)
        except BaseException as exc:
            for pool in pools:
                await pool.aclose()
            if isinstance(exc, OSError):
                raise SourceUnreachable(f"{location}: {(exc.strerror or 'system error').lower()}") from exc
            raise
        version = Version(resolved.identity, pinning, Samples() if samples is None else samples)
        return cls(origin, resolved, pools[0], pools[1], health, version)

    @property
    def identity(self) -> Identity:
        """The version found by `open`, with the validators that later answers have added."""
        return self._version.identity

    @property
    def received(self) -> int:
        """Bytes of bodies received, including those of unfinished transfers."""
        return self._urgent.received + self._background.received

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill `buffer` from `pos`; see `Source.read`.

        If a redirect target keeps failing, or redirects itself, ask the origin again and read from the new target.
        """
        check_range(pos, buffer.nbytes, self.identity.size)
        if not buffer.nbytes:
            await trio.lowlevel.checkpoint()
            return
        view = buffer.cast("B")
        if pos == 0 and len(view) == 1 and self.identity.size > 1:
            # busybox httpd takes `bytes=0-0` for `bytes=0-`.
            first_two = memoryview(bytearray(2))
            await self.read(0, first_two, urgent=urgent)
            view[:] = first_two[:1]
            return
        pool = self._urgent if urgent else self._background
        place = self._place
        try:
            seconds = self._health.silent_seconds(trio.current_time()) if place.redirected else math.inf
            await self._fetch(pool, place, pos, view, silent_seconds=seconds)
        except _Moved:
            await self._fetch_again(pool, await self._resolve_anew(place, None), pos, view)
        except SourceError as exc:
            if not place.redirected or isinstance(exc, SourceChanged):
                raise
            await self._fetch_again(pool, await self._resolve_failed(place, exc), pos, view)
        self._version.samples.offer(pos, view)
        if place.redirected and place is self._place:
            self._health.succeeded()

    def gather(self, seconds: float) -> None:
        """See `Gathers.gather`."""
        self._background.gather(seconds)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """None: HTTP does not report holes."""
        check_range(pos, size, self.identity.size)
        await trio.lowlevel.checkpoint()
        return None

    async def aclose(self) -> None:
        """Drop all connections. Reads in flight raise SourceUnreachable."""
        await self._urgent.aclose()
        await self._background.aclose()

    async def _fetch(
        self, pool: _Pool, place: Route, pos: int, view: memoryview, *, silent_seconds: float, follow: bool = True
    ) -> None:
        """Send one request, and further ones while the answers leave the version open.

        A 200 with the whole file may come from a cache that is just being filled, so it is worth a retry after a pause.
        A second one is a transient error and not a permanent one, because the server had ranges at the opening.
        """
        ignored = False
        for _ in range(MOST_ATTEMPTS):
            try:
                await self._request(pool, place, pos, view, silent_seconds=silent_seconds, follow=follow)
            except Unmet:
                place = await self._unconditional(place)
            except Doubted as doubt:
                await self._prove(doubt, place)
            except RangeIgnored as exc:
                if ignored:
                    raise SourceUnreachable(str(ignores_ranges(place.where)), reason=Reason.ANSWER) from exc
                ignored = True
                await trio.sleep(IGNORED_SECONDS)
            else:
                return
        raise _contradiction(place)

    async def _request(
        self, pool: _Pool, place: Route, pos: int, view: memoryview, *, silent_seconds: float, follow: bool
    ) -> None:
        silence = trio.CancelScope()

        def judge(answer: Answer) -> Part:
            silence.deadline = math.inf
            if follow and answer.status in REDIRECTS:
                raise _Moved
            return self._version.judge(answer, self._asked(place, pos, view))

        await pool.run(place, pos, view, judge, silence, silent_seconds)
        if silence.cancelled_caught:
            raise SourceUnreachable(f"{place.where}: no answer within {silent_seconds:g} s", reason=Reason.TIMEOUT)

    def _asked(self, place: Route, pos: int, view: memoryview) -> RangeRequest:
        return RangeRequest(
            pos, len(view), self.identity, place.where, conditional=place.conditional, place=place.target.place
        )

    async def _fetch_again(self, pool: _Pool, place: Route, pos: int, view: memoryview) -> None:
        with as_transient():
            await self._fetch(pool, place, pos, view, silent_seconds=math.inf, follow=False)
        if place is self._place:
            self._health.succeeded()

    async def _resolve_failed(self, failed: Route, error: SourceError) -> Route:
        """The target to use instead of a failed one. If there is none, raises `error` as a transient error."""
        if self._place is not failed:
            return self._place  # another reader has resolved meanwhile
        if self._health.lasting(error, trio.current_time()) and (self._resolving.locked() or self._may_ask()):
            return await self._resolve_anew(failed, error)
        raise self._health.failed(error) from error

    def _may_ask(self) -> bool:
        return self._health.may_ask(trio.current_time())

    async def _resolve_anew(self, stale: Route, error: SourceError | None) -> Route:
        """Ask the origin for the target, once for all waiting readers. `error`: why the stale target failed, if so."""
        async with self._resolving:
            if self._place is not stale:
                return self._place
            if error is not None and not self._may_ask():
                raise self._health.failed(error) from error
            self._health.asked(trio.current_time())
            place = await self._asked_for(stale, error)
            if place.target.url != stale.target.url:
                log.info("%s: read from %s from now on", self._origin.location, place.target.location)
            self._place = place
            return place

    async def _asked_for(self, stale: Route, error: SourceError | None) -> Route:
        try:
            resolved = await self._resolved()
        except QedfsError as exc:
            if not isinstance(error, SourceUnreachable):
                raise  # the stale target is of no use any more
            # The stale target may recover, and it has our version.
            raise self._health.failed(error, exc) from exc
        return self._place_of(resolved, conditional=stale.conditional)

    async def _resolved(self) -> Resolved:
        """Ask the origin again, and check that it leads to the same version. The caller holds `_resolving`."""
        resolved = await self._urgent.resolve(self._origin, self._health.at_opening_seconds, self._version.pinning)
        place = self._place_of(resolved, conditional=False)
        await self._version.accept(resolved.identity, place.where, partial(self._read_shown, resolved.identity, place))
        return resolved

    async def _unconditional(self, place: Route) -> Route:
        """The target without conditions in its requests, after it answered 412. Raises SourceChanged if that was right.

        Answers are compared in any case. A condition only saves the transfer of a wrong one.
        """
        async with self._resolving:
            if self._place is place:
                self._place = self._place_of(await self._resolved(), conditional=False)
            return self._place

    async def _prove(self, doubt: Doubted, place: Route) -> None:
        """Prove that the identity in an answer stands for the same version. Raises what `Version.admit` raises."""
        async with self._resolving:
            if not self._version.knows(doubt.shown):
                bare = dataclasses.replace(place, lines=request_lines(place.target, None), conditional=False)
                await self._version.admit(doubt, place.where, partial(self._read_shown, doubt.shown, bare))

    async def _read_shown(self, shown: Identity, place: Route, pos: int, view: memoryview) -> None:
        """Read bytes of the file that is reported as `shown`, for a proof."""

        def judge(answer: Answer) -> Part:
            return self._version.judge_shown(answer, self._asked(place, pos, view), shown)

        try:
            await self._urgent.run(place, pos, view, judge, trio.CancelScope(), math.inf)
        except (Doubted, Unmet, RangeIgnored) as exc:
            raise _contradiction(place) from exc

    def _place_of(self, resolved: Resolved, *, conditional: bool = True) -> Route:
        target, identity = resolved.target, self.identity
        return Route(
            target=target,
            lines=request_lines(target, identity if conditional else None),
            cookies=resolved.cookies,
            where=place_name(self._origin, target),
            redirected=target is not self._origin,
            conditional=conditional and bool(identity.strong_etag or identity.last_modified),
        )


def _contradiction(place: Route) -> SourceUnreachable:
    return SourceUnreachable(f"{place.where} contradicts itself from answer to answer", reason=Reason.ANSWER)
