"""The cache: one flight per key, within its bound, and nobody hangs on a flight that ended badly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfs.errors import SourceUnreachable
from qedfs.source.tables.cache import ENTRY_OVERHEAD_BYTES, Cache


class Loader:
    """Answers with ten times the key, when it is let."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate: trio.Event | None = None
        self.failure: Exception | None = None

    async def __call__(self, keys: list[int]) -> dict[int, int]:
        self.calls.append(keys)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return {key: 10 * key for key in keys}


@pytest.fixture
def loader() -> Loader:
    return Loader()


def cache_of(count: int, size_of: Callable[[int], int] = lambda _: 0) -> Cache[int, int]:
    return Cache(count * ENTRY_OVERHEAD_BYTES, size_of)


async def test_values_are_kept(loader: Loader) -> None:
    cache = cache_of(9)
    assert await cache.get([1, 2], loader) == {1: 10, 2: 20}
    assert await cache.get([2, 3], loader) == {2: 20, 3: 30}
    assert await cache.get([], loader) == {}
    assert loader.calls == [[1, 2], [3]]


async def test_the_least_recently_used_goes_first(loader: Loader) -> None:
    cache = cache_of(2)
    for key in (1, 2, 1, 3, 1, 2):
        assert await cache.get([key], loader) == {key: 10 * key}
    assert loader.calls == [[1], [2], [3], [2]]
    assert cache._share.held_bytes == 2 * ENTRY_OVERHEAD_BYTES


async def test_a_value_above_the_bound_is_handed_out_and_not_kept(loader: Loader) -> None:
    cache = cache_of(2, lambda _: 1 << 20)
    loader.gate = trio.Event()
    found: list[dict[int, int]] = []

    async def get() -> None:
        found.append(await cache.get([1], loader))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        nursery.start_soon(get)
        await wait_all_tasks_blocked()
        loader.gate.set()
    assert found == [{1: 10}, {1: 10}]
    assert loader.calls == [[1]]
    assert cache._share.held_bytes == 0


async def test_what_is_under_way_is_waited_for(loader: Loader) -> None:
    cache = cache_of(9)
    loader.gate = trio.Event()
    found: list[dict[int, int]] = []

    async def get(*keys: int) -> None:
        found.append(await cache.get(keys, loader))

    async with trio.open_nursery() as nursery:
        for keys in ([1, 2], [2, 3], [3, 1], [1, 2, 3]):
            nursery.start_soon(get, *keys)
            await wait_all_tasks_blocked()
        loader.gate.set()
    assert loader.calls == [[1, 2], [3]]
    assert sorted(len(each) for each in found) == [2, 2, 2, 3]
    assert all(value == 10 * key for each in found for key, value in each.items())


async def test_a_failure_goes_to_all_who_waited_and_is_not_kept(loader: Loader) -> None:
    cache = cache_of(9)
    loader.gate, loader.failure = trio.Event(), SourceUnreachable("away", retry_after_seconds=3)
    seen: list[SourceUnreachable] = []

    async def get() -> None:
        with pytest.raises(SourceUnreachable, match="away") as caught:
            await cache.get([1], loader)
        seen.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(get)
        await wait_all_tasks_blocked()
        loader.gate.set()
    assert len(set(map(id, seen))) == 3
    assert {each.retry_after_seconds for each in seen} == {3}
    loader.failure = None
    assert await cache.get([1], loader) == {1: 10}


async def test_a_cancelled_flight_is_taken_over(loader: Loader) -> None:
    cache = cache_of(9)
    loader.gate = trio.Event()
    found: list[dict[int, int]] = []

    async def get() -> None:
        found.append(await cache.get([1], loader))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as first:
                first.start_soon(get)
                await wait_all_tasks_blocked()
                nursery.start_soon(get)
                nursery.start_soon(get)
                await wait_all_tasks_blocked()
                scope.cancel()
        await wait_all_tasks_blocked()
        loader.gate.set()
    assert found == [{1: 10}, {1: 10}]
    assert loader.calls == [[1], [1]]
