"""HttpSource: the Source port over HTTP and HTTPS.

Owns the two connection pools, the effective URL, and the decision to resolve it anew. Must not know what an answer
has to look like (`judge.py`), how redirects are followed (`resolve.py`) or how libcurl is driven (`multi.py`).

Two pools, each with a Multi of its own: urgent reads find a warm connection that no background read can take, and
their sockets are served by a task of their own.

Concurrency. Any number of tasks may read. `_place` is replaced as a whole, under `_resolving`, by the one task that
resolves anew; a reader takes it once per try. An Exchange belongs to one read between `pop` and `append` of its
pool's `_idle`. `_Pool._slots` bounds the transfers that libcurl holds to its number of connections: a transfer that
waits inside libcurl for a free one would run into the time limit for connecting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import trio

from qedfs.errors import SourceChanged, SourceUnreachable, UsageError
from qedfs.source.base import Extent, Identity
from qedfs.source.http.answer import Answer
from qedfs.source.http.exchange import Exchange, Judge
from qedfs.source.http.judge import RangeRequest, judge_range
from qedfs.source.http.login import with_login
from qedfs.source.http.multi import Multi
from qedfs.source.http.resolve import REDIRECTS, Resolved, place_name, request_lines, resolve
from qedfs.source.http.target import Target, first_target
from qedfs.source.policy import Policy
from qedfs.source.url import Location

MAX_CONNECTIONS = 64  # per pool

# Answers of a place that a redirect led to which may only mean that the redirect has expired (signed URLs).
_EXPIRED = frozenset({403, 404, 410})


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where reads go now: built once per resolution, so that a request costs no string work."""

    target: Target
    lines: tuple[str, ...] = dataclasses.field(repr=False)
    where: str
    redirected: bool


class _PlaceExpired(Exception):
    """The effective URL no longer serves the file; the original one may lead to a new place."""


class _Pool:
    """Connections of one urgency, and the idle handles that go with them."""

    def __init__(self, policy: Policy, nursery: trio.Nursery) -> None:
        self._multi = Multi(nursery, max_connections=MAX_CONNECTIONS)
        self._slots = trio.Semaphore(MAX_CONNECTIONS)
        self._policy = policy
        self._idle: list[Exchange] = []
        self._busy: set[Exchange] = set()
        self._done = 0

    @property
    def received(self) -> int:
        return self._done + sum(exchange.filled for exchange in self._busy)

    async def run(self, place: _Place, pos: int, buffer: memoryview, judge: Judge) -> None:
        async with self._slots:
            exchange = self._idle.pop() if self._idle else Exchange(self._policy)
            self._busy.add(exchange)
            try:
                exchange.aim(place.target, place.lines)
                await exchange.run(self._multi, pos, buffer, judge, place.where)
                self._done += len(buffer)
            finally:
                self._busy.discard(exchange)
                self._idle.append(exchange)

    async def resolve(self, origin: Target) -> Resolved:
        exchange = Exchange(self._policy)
        try:
            return await resolve(origin, exchange, self._multi, self._policy)
        finally:
            exchange.close()

    async def aclose(self) -> None:
        await self._multi.aclose()
        while self._idle:
            self._idle.pop().close()


class HttpSource:
    """A file behind an http or https URL (the `Source` port). Made by `open`, ended by `aclose`."""

    def __init__(self, origin: Target, resolved: Resolved, urgent: _Pool, background: _Pool) -> None:
        self._origin = origin
        self._identity = resolved.identity
        self._urgent = urgent
        self._background = background
        self._resolving = trio.Lock()
        self._place = self._place_of(resolved.target)

    @classmethod
    async def open(
        cls, location: Location, policy: Policy, nursery: trio.Nursery, *, headers: Sequence[str] = ()
    ) -> HttpSource:
        """Follow redirects to the file and learn its identity. `headers` are extra "Name: value" lines.

        Two tasks run in `nursery` until `aclose`; if the nursery ends before, all reads raise SourceUnreachable.

        Raises:
            Refused: the policy forbids the place, an address, or a redirect.
            UsageError: the location is not http, or a header line is garbled.
            SourceUnreachable: no usable answer now.
            SourceError: a permanent refusal; the server ignores ranges; it does not tell the size.
        """
        if location.kind != "http":
            raise UsageError(f"backing {location} is not an http or https URL")
        policy.check_location(location)
        origin = await with_login(first_target(location, headers))
        pools: list[_Pool] = []
        try:
            pools.extend(_Pool(policy, nursery) for _ in range(2))
            # The connection that this leaves open is there for the first urgent read.
            resolved = await pools[0].resolve(origin)
        except BaseException as exc:
            for pool in pools:
                await pool.aclose()
            if isinstance(exc, OSError):
                raise SourceUnreachable(f"{location}: {(exc.strerror or 'system error').lower()}") from exc
            raise
        return cls(origin, resolved, *pools)

    @property
    def identity(self) -> Identity:
        """The version found by `open`, with the validators that answers have told since."""
        return self._identity

    @property
    def parallel(self) -> int:
        """As many background reads as the pool has connections."""
        return MAX_CONNECTIONS

    @property
    def received(self) -> int:
        """Bytes of bodies, those of transfers under way included."""
        return self._urgent.received + self._background.received

    async def read(self, pos: int, buffer: memoryview, *, urgent: bool = False) -> None:
        """Fill `buffer` from `pos`; see `Source.read`.

        If a redirect led here and the place now says 403, 404 or 410, or redirects itself, the original URL is asked
        once for the way: signed URLs expire.
        """
        if not 0 <= pos <= pos + buffer.nbytes <= self._identity.size:
            raise ValueError(f"range {pos}+{buffer.nbytes} is outside the source of {self._identity.size} bytes")
        if not buffer.nbytes:
            await trio.lowlevel.checkpoint()
            return
        view = buffer.cast("B")
        pool = self._urgent if urgent else self._background
        place = self._place
        try:
            await self._fetch(pool, place, pos, view, resolve_anew=True)
        except _PlaceExpired:
            place = await self._resolve_anew(place)
            await self._fetch(pool, place, pos, view, resolve_anew=False)

    async def extents(self, pos: int, size: int) -> Sequence[Extent] | None:
        """None: HTTP does not tell holes."""
        await trio.lowlevel.checkpoint()
        return None

    async def aclose(self) -> None:
        """Drop all connections. Reads in flight raise SourceUnreachable."""
        await self._urgent.aclose()
        await self._background.aclose()

    async def _fetch(self, pool: _Pool, place: _Place, pos: int, view: memoryview, *, resolve_anew: bool) -> None:
        def judge(answer: Answer) -> bool:
            if resolve_anew and (answer.status in REDIRECTS or (place.redirected and answer.status in _EXPIRED)):
                raise _PlaceExpired
            # By what is known now: two answers that both tell what the first one did not must agree as well.
            self._identity = judge_range(answer, RangeRequest(pos, len(view), self._identity, place.where))
            return True

        await pool.run(place, pos, view, judge)

    async def _resolve_anew(self, stale: _Place) -> _Place:
        async with self._resolving:
            if self._place is stale:
                resolved = await self._urgent.resolve(self._origin)
                difference = self._identity.difference(resolved.identity)
                if difference is not None:
                    raise SourceChanged(f"{self._origin.location}: {difference}")
                self._identity = self._identity.joined(resolved.identity)
                self._place = self._place_of(resolved.target)
            return self._place

    def _place_of(self, target: Target) -> _Place:
        return _Place(
            target=target,
            lines=request_lines(target, self._identity),
            where=place_name(self._origin, target),
            redirected=target is not self._origin,
        )
