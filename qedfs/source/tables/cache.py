"""An LRU cache with a bound in bytes, where concurrent requests for one key share one load.

Owns what is cached and who loads it. Must not know what the values are.

Concurrency. A *flight* is one call of a loader, for all its keys at once. There is no await between the look-up and the
registration of flights. A cancelled flight leaves nothing behind, and the tasks that waited for it load the values
themselves. A task never waits for another flight while its own is under way, so there is no deadlock.

A flight is not a `SingleFlight`, which shares one result. Here the keys of two tasks may overlap only in part, and a
load runs in the task that needs it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Generic, TypeVar

import trio

from qedfs.errors import QedfsError
from qedfs.host import memory_pool
from qedfs.host.memory_pool import Share

K = TypeVar("K")
V = TypeVar("V")

ENTRY_OVERHEAD_BYTES = 256  # estimate for a value's Python objects and its dictionary entry


class _Flight(Generic[K, V]):
    def __init__(self) -> None:
        self.over = trio.Event()
        self.values: Mapping[K, V] = {}
        self.error: QedfsError | None = None


class Cache(Generic[K, V]):
    """An LRU cache. `size_of` returns the bytes of a value."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        """`max_bytes`: the bound, which is lower while others need the memory (`memory_pool.py`)."""
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._share = Share(memory_pool.TABLES)
        self._flights: dict[K, _Flight[K, V]] = {}

    def close(self) -> None:
        """Drop everything. The cache must not be used afterwards."""
        self._kept.clear()
        self._share.close()

    def kept(self, key: K) -> V | None:
        """A value if it is cached, without waiting."""
        return self._kept.get(key)

    async def get(self, keys: Iterable[K], load: Callable[[list[K]], Awaitable[Mapping[K, V]]]) -> dict[K, V]:
        """The values of `keys`. `load` gets the keys that are neither cached nor being loaded, and returns all values.

        If a loader raises QedfsError, all tasks that waited for it get the error.
        """
        wanted = list(keys)
        found: dict[K, V] = {}
        while True:
            self._take_kept(wanted, found)
            wanted = [key for key in wanted if key not in found]
            if not wanted:
                return found
            mine = [key for key in wanted if key not in self._flights]
            if mine:
                found.update(await self._load(mine, load))
                continue
            flight = self._flights[wanted[0]]
            await flight.over.wait()
            if flight.error is not None:
                raise flight.error.fresh()
            # Take the values from the flight, not from the cache: a value larger than the bound is not cached.
            found.update((key, flight.values[key]) for key in wanted if key in flight.values)

    async def _load(self, keys: list[K], load: Callable[[list[K]], Awaitable[Mapping[K, V]]]) -> Mapping[K, V]:
        flight = _Flight[K, V]()
        self._flights.update(dict.fromkeys(keys, flight))
        try:
            values = flight.values = await load(keys)
        except QedfsError as exc:
            flight.error = exc
            raise
        finally:
            for key in keys:
                del self._flights[key]
            flight.over.set()
        for key, value in values.items():
            self._keep(key, value)
        return values

    def _take_kept(self, keys: list[K], found: dict[K, V]) -> None:
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]

    def _keep(self, key: K, value: V) -> None:
        if key in self._kept:
            return
        self._kept[key] = value
        self._share.take(self._bytes(value))
        while self._share.held_bytes > self._max_bytes or self._share.is_over:
            _, dropped = self._kept.popitem(last=False)
            self._share.give(self._bytes(dropped))

    def _bytes(self, value: V) -> int:
        return self._size_of(value) + ENTRY_OVERHEAD_BYTES
