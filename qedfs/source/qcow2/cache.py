"""Things that were fetched and will be wanted again, within a bound of bytes, each fetched by one task at a time.

Owns what is kept and who fetches. Must not know what the values are.

Concurrency. A *flight* is one call of a loader, for all its keys at once. Look-up and registration of flights happen
without an await in between. A task whose flight was cancelled leaves nothing behind; whoever waited for it looks again
and loads for itself. A task never waits for another's flight while its own is under way, so flights cannot wait for
each other in a circle.
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

ENTRY_OVERHEAD_BYTES = 256  # of a value's Python objects and its place in the tables


class _Flight(Generic[K, V]):
    def __init__(self) -> None:
        self.over = trio.Event()
        self.values: Mapping[K, V] = {}
        self.error: QedfsError | None = None


class Cache(Generic[K, V]):
    """Least recently used values go first. `size_of` tells the bytes of a value."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        """`max_bytes`: kept at the most; less where others need the room (`memory_pool.py`)."""
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._share = Share(memory_pool.TABLES)
        self._flights: dict[K, _Flight[K, V]] = {}

    @property
    def kept_bytes(self) -> int:
        """What the values take, with an estimate of what Python adds."""
        return self._share.held_bytes

    def close(self) -> None:
        """Forget all; nobody asks any more."""
        self._kept.clear()
        self._share.close()

    def kept(self, key: K) -> V | None:
        """A value that is kept, at once."""
        return self._kept.get(key)

    async def get(self, keys: Iterable[K], load: Callable[[list[K]], Awaitable[Mapping[K, V]]]) -> dict[K, V]:
        """The values of `keys`; `load` is given those that are neither kept nor under way, and returns all of them.

        Raises the loader's QedfsError, to everybody who waited for it.
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
            # Taken from the flight and not from what is kept: a value larger than the bound is not kept.
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
