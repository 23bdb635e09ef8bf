"""HttpSource: the Source port over HTTP and HTTPS.

Owns the two connection pools, the effective URL, and the decision to resolve it anew. Must not know what an answer
has to look like (`judge.py`), how redirects are followed (`resolve.py`) or how libcurl is driven (`multi.py`).

Two pools, each with a Multi of its own: urgent reads find a warm connection that no background read can take, and
their sockets are served by a task of their own.

Concurrency. Any number of tasks may read. `_place` is replaced as a whole, under `_resolving`, by the one task that
resolves anew; a reader takes it once per try. An Exchange belongs to one read between `pop` and `append` of its
pool's `_idle`. `_Pool.slots` bounds the transfers that libcurl holds to its number of connections: a transfer that
waits inside libcurl for a free one would run into the time limit for connecting.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import trio

from qedfs.errors import SourceChanged, SourceError, UsageError
from qedfs.source.base import Extent, Identity
from qedfs.source.http.answer import Answer
from qedfs.source.http.exchange import Exchange, Judge
from qedfs.source.http.judge import RangeRequest, judge_range
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


class _PlaceExpired(Exception):  # noqa: N818  -- an event inside this module
    """The effective URL no longer serves the file; the original one may lead to a new place."""


class _Pool:
    """Connections of one urgency, and the idle handles that go with them."""

    def __init__(self, policy: Policy, nursery: trio.Nursery) -> None:
        self.multi = Multi(nursery, max_connections=MAX_CONNECTIONS)
        self.slots = trio.Semaphore(MAX_CONNECTIONS)
        self._policy = policy
        self._idle: list[Exchange] = []

    def take(self) -> Exchange:
        return self._idle.pop() if self._idle else Exchange(self._policy)

    def give_back(self, exchange: Exchange) -> None:
        self._idle.append(exchange)

    async def run(self, place: _Place, pos: int, buffer: memoryview, judge: Judge) -> None:
        async with self.slots:
            exchange = self.take()
            try:
                exchange.aim(place.target, place.lines)
                await exchange.run(self.multi, pos, buffer, judge, place.where)
            finally:
                self.give_back(exchange)

    async def aclose(self) -> None:
        await self.multi.aclose()
        while self._idle:
            self._idle.pop().close()
